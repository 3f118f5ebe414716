"""Text in and out: vocabulary, chat template, incremental detokenising, stop strings."""
