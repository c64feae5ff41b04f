"""Generating, comparing, measuring: what a program that generates does not import (extra ``lab``)."""
