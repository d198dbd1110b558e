"""llmopt.optimize over a function that returns a model: `generate` keeps working and runs the step program."""

import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import llmopt

FOLDER = Path(__file__).parent / "models" / "target"


def plain() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


@llmopt.optimize
def fast() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    tokens = tokenizer("class PriorityQueue(Queue):\n    '''", return_tensors="pt")
    texts = []
    for name, make in (("transformers", plain), ("llmopt", fast)):
        model = make()
        model.generate(**tokens, max_new_tokens=4, do_sample=False)  # compiles
        begin = time.perf_counter()
        out = model.generate(**tokens, max_new_tokens=64, do_sample=False)
        new = out.shape[1] - tokens["input_ids"].shape[1]
        print(f"{name}: {new / (time.perf_counter() - begin):.0f} tokens/s")
        texts.append(tokenizer.decode(out[0], skip_special_tokens=True))
    print("same tokens" if texts[0] == texts[1] else "DIFFERENT TOKENS", texts[1], sep="\n\n")


if __name__ == "__main__":
    main()
