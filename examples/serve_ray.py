"""The same server on Ray Serve: as many replicas as asked for, on one machine or many.

    pip install 'eepass[ray]'
    MODEL=smollm2 REPLICAS=2 python examples/serve_ray.py

Clients find it at http://localhost:8000/v1, as that of serve.py.
"""

import os

from ray import serve

import eepass
from eepass.hf.serving import openai_app


def app():
    """Called in each replica: a model of its own, on the CPUs Ray gives it."""
    loaded = eepass.load(os.environ.get("MODEL", "smollm2"))
    eepass.prepare(loaded.model, loaded.artifact, max_length=4096)
    return openai_app(loaded)


@serve.deployment(
    num_replicas=int(os.environ.get("REPLICAS", "2")), ray_actor_options={"num_cpus": 1}
)
@serve.ingress(app)
class Replica:
    pass


if __name__ == "__main__":
    serve.run(Replica.bind(), blocking=True)
