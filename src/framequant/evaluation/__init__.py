"""Reading texts and images, and measuring models on them: perplexity, accuracy, divergence from float."""
