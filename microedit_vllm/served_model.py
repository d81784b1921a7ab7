"""A MicroEdit server, seen by a client: the `openai` client and the server's own routes."""

from dataclasses import dataclass
from typing import Any, Self

from openai import DefaultHttpxClient, NotFoundError, OpenAI, OpenAIError

from microedit_vllm.errors import MicroEditError


@dataclass(frozen=True)
class ServedModel:
    """One model of a vLLM server on loopback or elsewhere."""

    client: OpenAI
    model: str

    @classmethod
    def connect(cls, base_url: str, api_key: str = "none") -> Self:
        """Connect to a server, with or without /v1 in `base_url`; takes its first model.

        Raises:
            MicroEditError: no OpenAI-compatible server answers there.
        """
        root = base_url.rstrip("/").removesuffix("/v1")
        # No proxy from the environment: the server is named by the user.
        client = OpenAI(
            base_url=f"{root}/v1",
            api_key=api_key,
            http_client=DefaultHttpxClient(trust_env=False),
            timeout=600,
        )
        try:
            return cls(client, next(iter(client.models.list())).id)
        except (OpenAIError, StopIteration, ValueError) as error:
            raise MicroEditError(
                f"no server with a model answers at {base_url}: {error}"
            ) from error

    def edit_set(self) -> dict[str, Any]:
        """What `GET /v1/microedit` shows of the loaded set.

        Raises:
            MicroEditError: the server serves none.
        """
        try:
            return self.client.get("/microedit", cast_to=dict[str, Any])
        except NotFoundError as error:
            raise MicroEditError(
                f"the server at {self.client.base_url} serves no edit set; "
                "start it with --microedit SET"
            ) from error
        except OpenAIError as error:
            raise MicroEditError(f"the server shows no edit set: {error}") from error

    def decision(self, request_id: str) -> dict[str, Any]:
        """What the switch decided for a request: `ard` (+∞ if nothing was scored), `tau`, `on`.

        Raises:
            MicroEditError: the server does not know the request.
        """
        found = self.find_decision(request_id)
        if found is None:
            raise MicroEditError(f"the server tells no decision for {request_id}")
        return found

    def find_decision(self, request_id: str) -> dict[str, Any] | None:
        """The same; None for a request that the server does not know.

        Raises:
            MicroEditError: the server does not answer.
        """
        try:
            found = self.client.get(f"/microedit/requests/{request_id}", cast_to=dict[str, Any])
        except NotFoundError:
            return None
        except OpenAIError as error:
            raise MicroEditError(
                f"the server tells no decision for {request_id}: {error}"
            ) from error
        ard = found.get("ard")
        return {**found, "ard": float("inf") if ard is None else float(ard)}
