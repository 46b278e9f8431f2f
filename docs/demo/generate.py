"""Lets an exported model write on, with nothing but transformers.

python docs/demo/generate.py .demo/model "def main("
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed


def main() -> None:
    folder, prompt = sys.argv[1:3]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    set_seed(0)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    options = {"do_sample": True, "temperature": 0.7, "top_k": 50, "max_new_tokens": 100}
    with torch.no_grad():
        output = model.generate(**inputs, **options, pad_token_id=tokenizer.eos_token_id)
    print(tokenizer.decode(output[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
