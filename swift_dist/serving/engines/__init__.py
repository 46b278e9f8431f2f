"""One engine a file, found by its name: ``--infer_backend vllm`` is ``engines/vllm.py``."""
