"""llmopt as a backend of torch.compile, found by its name: nothing of llmopt is imported here.

`torch.compile(model).generate()` would call the uncompiled forward, so it is the forward that is compiled.
"""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).parent / "models" / "target"


@torch.no_grad()
def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    tokens = tokenizer("def quantiles(data, *, n=4, method='exclusive'):", return_tensors="pt")

    expected = model(**tokens).logits
    model.forward = torch.compile(model.forward, backend="llmopt", dynamic=True)
    actual = model(**tokens).logits

    torch.testing.assert_close(actual, expected)
    print(f"logits {tuple(actual.shape)} agree with eager to {(actual - expected).abs().max():.1e}")

    out = model.generate(**tokens, max_new_tokens=40, do_sample=False)
    print(tokenizer.decode(out[0], skip_special_tokens=True))


if __name__ == "__main__":
    main()
