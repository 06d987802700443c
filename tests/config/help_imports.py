"""A program for tests: print the help of a script, then the heavy libraries that it imported."""

import runpy
import sys

HEAVY = {"torch", "transformers", "datasets", "accelerate", "evaluate"}

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        print("imported:", sorted(HEAVY & set(sys.modules)))
