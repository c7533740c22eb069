"""silotune: federated fine-tuning of language models over institutions whose text may not leave."""
