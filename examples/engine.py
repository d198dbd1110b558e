"""Runs an engine file: no model code, no Dynamo, no transformers in this process.

usage: python examples/engine.py m.engine "import os" [more prompts] [--max-tokens 32] [--json]
"""

import argparse
import json
import sys

import llmopt


def main() -> None:
    parser = argparse.ArgumentParser(description="Complete prompts with an engine file.")
    parser.add_argument("engine", help="a file that llmopt.export wrote")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--ignore-eos", action="store_true", help="go on past the end-of-text token")
    parser.add_argument("--json", action="store_true", help="one JSON object: token ids, and which modules were loaded")
    options = parser.parse_args()

    llm = llmopt.load(options.engine)
    sampling = llmopt.SamplingParams(temperature=0.0, max_tokens=options.max_tokens, ignore_eos=options.ignore_eos)
    outputs = llm.generate(options.prompts, sampling)

    heavy = [name for name in ("transformers", "torch._dynamo", "torch._inductor") if name in sys.modules]
    if options.json:
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        print(json.dumps({"token_ids": tokens, "loaded": heavy}))
        return
    for output in outputs:
        print((output.prompt or "") + output.outputs[0].text, end="\n\n")
    print("loaded in this process:", ", ".join(heavy) or "neither transformers nor torch._dynamo")


if __name__ == "__main__":
    main()
