"""What llmopt makes of a model: passes and their matches, near misses with the reason, kernels, fallbacks."""

from pathlib import Path

import llmopt


def main() -> None:
    llm = llmopt.LLM(Path(__file__).parent / "models" / "target", dtype="float32")
    llm.generate("import os", llmopt.SamplingParams(temperature=0.0, max_tokens=1))  # compiles
    print(llmopt.explain(llm))


if __name__ == "__main__":
    main()
