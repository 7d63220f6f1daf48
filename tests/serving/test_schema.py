"""Oracle: schemathesis reads `/openapi.json` and asks what it allows, and what it does not."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode, checks

from liaoyuan.inference import EngineConfig
from liaoyuan.serving import Access, open_server

# Not asked: whether all that the schema allows is accepted. Lengths in tokens, and what must not come together, no
# schema says; a string in a header is no decent id.
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.unsupported_method,
]
FIXED = {"max_tokens": 4, "max_completion_tokens": 4, "n": 2, "best_of": 2}  # or a case would take minutes


@pytest.fixture(scope="module")
def schema(model_folder: Path) -> Iterator[schemathesis.BaseSchema]:
    engine = EngineConfig(max_sequences=16)
    with open_server(model_folder, port=0, engine=engine, access=Access(timeout=20.0)) as server:
        yield schemathesis.openapi.from_url(server.url + "/openapi.json")


def test_no_request_makes_the_server_fail_or_say_what_it_does_not_document(schema: schemathesis.BaseSchema) -> None:
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 15
    for operation in operations:
        for mode in GenerationMode:

            @given(operation.as_strategy(generation_mode=mode))
            @settings(max_examples=6, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
            def asked(case: schemathesis.Case) -> None:
                if isinstance(case.body, dict):
                    case.body = {**case.body, **{name: FIXED[name] for name in case.body.keys() & FIXED.keys()}}
                case.call_and_validate(checks=CHECKS, timeout=60)

            with contextlib.suppress(Unsatisfiable):  # what takes no input cannot be asked wrongly
                asked()
