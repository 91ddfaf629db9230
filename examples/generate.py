"""Continue a prompt with the base model and with a checkpoint's adapter; it needs PEFT, not async_ckpt.

python examples/generate.py runs/zen/latest ["The beginning of a sentence"]
"""

from __future__ import annotations

import sys

import torch
from peft import PeftModel
from prepare_model import MODEL
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "The Zen of Python, by Tim Peters\n\nBeautiful is"


def main() -> None:
    checkpoint, prompt = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else PROMPT
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, checkpoint).eval()
    inputs = tokenizer(prompt, return_tensors="pt")

    def continuation() -> str:
        tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        return tokenizer.decode(tokens[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)

    with model.disable_adapter():
        print(f"base\n{continuation().strip()}\n")
    print(f"tuned\n{continuation().strip()}")


if __name__ == "__main__":
    main()
