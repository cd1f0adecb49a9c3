"""A model behind the OpenAI protocol, as eepass serve does it, in a thread of a program.

pip install 'eepass[serve]'
python examples/serve.py [PORT]

curl localhost:8000/v1/chat/completions -H 'content-type: application/json' -d
    '{"model": "smollm2", "messages": [{"role": "user", "content": "Why is the sea salty?"}]}'
"""

import sys

import eepass

loaded = eepass.load("smollm2")  # or a Hugging Face folder, id, or .gguf file
server = eepass.serve(loaded, port=int(sys.argv[1]) if len(sys.argv) > 1 else 8000)
print(f"{loaded.name} at {server.url}; Ctrl-C ends it", flush=True)
server.wait()
