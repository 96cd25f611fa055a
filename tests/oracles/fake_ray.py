"""Ray's API as far as ddpmx uses it, in this process: actors that answer when they are waited for, and die to order."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any


class RayError(Exception):
    pass


class RayTaskError(RayError):
    pass


class RayActorError(RayError):
    pass


class Actor:
    def __init__(self, ray: FakeRay, cls: type, arguments: tuple[Any, ...]) -> None:
        self._ray, self._made = ray, cls(*arguments)
        self.alive = True
        self.number = len(ray.actors)
        ray.actors.append(self)

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: Answer(self, name, arguments))


class Answer:
    def __init__(self, actor: Actor, name: str, arguments: tuple[Any, ...]) -> None:
        self.actor, self.name, self.arguments = actor, name, arguments


class FakeRay:
    """
    Args:
        cpus, gpus: of each machine.
        deaths: (number of the actor, call of its) at which it dies, once it has worked; "open" is the first.
    """

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError, RayActorError=RayActorError)

    def __init__(self, cpus=(4,), gpus=0, deaths=(), always_die=False, no_cluster=False):
        self._nodes = [{"Alive": True, "Resources": {"CPU": float(n), "GPU": float(gpus)}} for n in cpus]
        self.deaths, self.always_die, self.no_cluster = set(deaths), always_die, no_cluster
        self.actors: list[Actor] = []
        self.calls: dict[int, int] = {}
        self.options: dict[str, Any] = {}
        self.started, self.stopped, self.killed = [], 0, []

    def is_initialized(self):
        return False

    def init(self, **options):
        self.started.append(options)
        if self.no_cluster:
            raise ConnectionError("Could not find any running Ray instance.\nmore")

    def shutdown(self):
        self.stopped += 1

    def nodes(self):
        return self._nodes

    def put(self, value):
        return pickle.loads(pickle.dumps(value))  # as in another process

    def remote(self, **options):
        self.options = options
        return lambda cls: SimpleNamespace(remote=lambda *arguments: Actor(self, cls, arguments))

    def wait(self, answers, num_returns, timeout):
        assert answers, "Ray raises for an empty list"
        return answers[:num_returns], answers[num_returns:]

    def get(self, answer):
        number = answer.actor.number
        call = self.calls[number] = self.calls.get(number, -1) + 1
        if self.always_die or (number, call) in self.deaths:
            answer.actor.alive = False
            raise RayActorError("The actor died unexpectedly before finishing this task.\n\tclass_name: Worker")
        try:
            return getattr(answer.actor._made, answer.name)(*answer.arguments)
        except Exception as error:
            raise RayTaskError(f"ray::Worker.{answer.name}()\n{type(error).__name__}: {error}") from error

    def kill(self, actor):
        self.killed.append(actor.number)
