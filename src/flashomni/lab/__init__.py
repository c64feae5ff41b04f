"""Generating, comparing, measuring: what a library user need not import (extra ``lab``)."""
