"""The compatibility matrix: what happens on every transformer class and pipeline of diffusers.

``tools/compatibility.py`` runs it. ``small`` says where small models come from, ``models`` checks
one of them, ``pipelines`` one pipeline, ``jobs`` runs checks in processes of their own, ``page``
writes.
"""
