"""What is remembered between steps: caches, histories, spans, and how they are kept."""
