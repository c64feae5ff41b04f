"""Generating, comparing, measuring: what serving does not import (extra ``lab``)."""
