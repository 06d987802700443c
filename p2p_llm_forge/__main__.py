"""`python -m p2p_llm_forge` is the command `p2p-llm-forge`, and that is train.py."""

from train import cli

if __name__ == "__main__":
    cli()
