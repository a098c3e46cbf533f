"""Sends three agents for two models to a running gateway and prints the answer.

.venv/bin/python examples/send_request.py [http://127.0.0.1:8000]
"""

import json
import sys

import httpx

TIMEOUT_S = 30
REQUEST = {
    "agents": {
        "alice": {"vector": [0.1, 0.2, 0.3], "model_name": "churn", "agent_type": "buyer"},
        "bob": {"vector": [0.4, 0.5, 0.6], "model_name": "churn", "agent_type": "buyer"},
        "carol": {"vector": [0.7, 0.8, 0.9], "model_name": "fraud", "agent_type": "seller"},
    },
    "timeout_s": TIMEOUT_S,
}


def main(arguments: list[str]) -> int:
    """Exit status: 0 when every agent was answered, 1 otherwise."""
    url = arguments[0] if arguments else "http://127.0.0.1:8000"
    try:
        # trust_env=False: a proxy from the environment has no business on the loopback.
        response = httpx.post(f"{url}/predict", json=REQUEST, timeout=TIMEOUT_S + 5, trust_env=False)
    except httpx.TransportError as exc:
        print(f"no gateway at {url}: {exc}\nstart one with: make run", file=sys.stderr)
        return 1
    print(f"{response.status_code} {response.reason_phrase}")
    print(_pretty(response))
    return 0 if response.status_code == 200 else 1


def _pretty(response: httpx.Response) -> str:
    try:
        return json.dumps(response.json(), indent=2, ensure_ascii=False)
    except json.JSONDecodeError:
        return response.text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
