"""The same server on Ray Serve: as many replicas as asked for, on one machine or many.

    pip install 'eepass[ray]'
    MODEL=smollm2 REPLICAS=2 python examples/serve_ray.py

Clients find it at http://localhost:8000/v1, as that of serve.py; other names than localhost are
given to openai_app as allow_host=[...].
"""

import os

from ray import serve

import eepass
from eepass.server.running import openai_app


def app():
    """Called in each replica: a model of its own, on the CPUs Ray gives it."""
    return openai_app(eepass.load(os.environ.get("MODEL", "smollm2")))


@serve.deployment(
    num_replicas=int(os.environ.get("REPLICAS", "2")), ray_actor_options={"num_cpus": 1}
)
@serve.ingress(app)
class Replica:
    async def check_health(self):
        """Ray replaces a replica whose model does not decode."""
        await self.app.check()


if __name__ == "__main__":
    serve.run(Replica.bind(), blocking=True)
