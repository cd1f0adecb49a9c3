"""Early exit in a few lines of Python.

python examples/transform.py "Why is the sea salty?"
"""

import sys

import eepass

prompt = sys.argv[1] if len(sys.argv) > 1 else "Why is the sea salty?"
loaded = eepass.load("smollm2")
model = eepass.transform(loaded.model, artifact=loaded.artifact, stop=loaded.stop)
ids = loaded.encode(prompt)
output = model.generate([ids], max_new_tokens=64)
print(loaded.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
print(f"{model.statistics.mean_exit_layer:.1f} of {model.decoder.num_layers} layers a token")
