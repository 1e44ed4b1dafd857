"""How good a quantized model is: texts, models, perplexity, tasks."""
