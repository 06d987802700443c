"""Tests of everything that is promised, and the plain modules that they share."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
