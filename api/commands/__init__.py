"""Commands of `llmopt` that say what the compiler did: `explain`, `bisect`, `repro`; and what all commands share."""
