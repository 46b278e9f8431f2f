"""The program behind `gang.Gang`; see `forked_ranks.py`.

Without imports of its own: the helper that megatron-core's save spawns imports its parent's program first.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parent))
    from forked_ranks import main

    main()
