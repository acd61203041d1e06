"""Which policy answers: roles by model name, header and system prompt; prompts put in place."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_ray.errors import UserError
from lightning_ray.gateway import GatewayConfig, RoleConfig, make_roles, models_of
from lightning_ray.gateway.system_prompt import apply_prompt, system_prompt
from lightning_ray.policies import PromptVersion

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"


def roles(**configs: RoleConfig):
    return make_roles(GatewayConfig(roles=configs), "planner", ["planner", "solver"])


def request(path: str, system: str, user: str = "Hello") -> dict:
    """A request with a system prompt, in the protocol of `path`."""
    if path == MESSAGES:
        return {"model": "m", "system": system, "messages": [{"role": "user", "content": user}]}
    if path == RESPONSES:
        return {"model": "m", "instructions": system, "input": user}
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    return {"model": "m", "messages": messages}


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
def test_roles_that_ask_for_one_model_are_told_apart_by_their_system_prompt(path):
    made = roles(
        planner=RoleConfig(model="m", system="^You plan"),
        solver=RoleConfig(model="m", policy="solver"),
    )
    for system, expected in (("You plan.", "planner"), ("You solve.", "solver"), ("", "solver")):
        found = next(r for r in made if r.matches(path, request(path, system), {}))
        assert found.name == expected


def test_roles_can_be_told_apart_by_a_header():
    made = roles(
        planner=RoleConfig(model="m", headers={"X-Agent": "planner"}),
        solver=RoleConfig(model="m", policy="solver"),
    )
    assert made[0].matches(CHAT, {"model": "m"}, {"x-agent": "planner"})
    assert not made[0].matches(CHAT, {"model": "m"}, {"x-agent": "solver"})


def test_without_roles_every_model_name_is_the_trained_policys():
    made = make_roles(GatewayConfig(models=["a", "b"]), "planner", ["planner"])
    assert [(role.name, role.policy) for role in made] == [("a", "planner"), ("b", "planner")]
    assert models_of(made, "planner") == ["a", "b"]


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ({"planner": RoleConfig(model="m", policy="nobody")}, "no such policy; there are: planner"),
        ({"planner": RoleConfig(policy="planner")}, "name the model that the role asks for"),
        ({"planner": RoleConfig(model="m", system="(")}, "no regular expression"),
        (
            {"all": RoleConfig(model="m"), "solver": RoleConfig(model="m", policy="solver")},
            "gateway.roles.solver can never match: all comes first",
        ),
        ({"planner": RoleConfig(model="m")}, "no role in gateway.roles is answered by policy sol"),
    ],
)
def test_a_role_that_cannot_work_is_refused_before_anything_starts(configs, message):
    with pytest.raises(UserError, match=message):
        roles(**configs)


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
@given(system=st.text(min_size=1), text=st.text(), user=st.text(min_size=1))
def test_a_prompt_takes_the_place_of_its_seed_and_of_nothing_else(path, system, text, user):
    body = request(path, system, user)
    before = json.dumps(body)
    prompt = PromptVersion("planner", 3, system, text, (("What is 1?", "one"),))
    changed = apply_prompt(path, body, prompt)
    assert changed is not None and json.dumps(body) == before
    assert system_prompt(path, changed) == text
    key = "input" if path == RESPONSES else "messages"
    tail = [(turn["role"], turn["content"]) for turn in changed[key]][-3:]
    assert tail == [("user", "What is 1?"), ("assistant", "one"), ("user", user)]


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
def test_a_prompt_is_put_into_a_system_prompt_made_of_blocks_around_what_changes(path):
    body = request(path, "placeholder")
    blocks = [{"type": "text", "text": "Be brief. Today is Monday."}]
    if path == MESSAGES:
        body["system"] = blocks
    elif path == RESPONSES:
        body.pop("instructions")
        body["input"] = [{"role": "developer", "content": blocks}]
    else:
        body["messages"][0]["content"] = blocks
    changed = apply_prompt(path, body, PromptVersion("p", 1, "Be brief.", "Be long."))
    assert system_prompt(path, changed) == "Be long. Today is Monday."


def test_a_prompt_whose_seed_does_not_occur_changes_nothing():
    prompt = PromptVersion("p", 1, "Be brief.", "Be long.")
    assert apply_prompt(CHAT, request(CHAT, "Be kind."), prompt) is None
