"""The families: how each writes its `config.json` and its weights. One file per kin, read and written by tables."""

from collections.abc import Mapping
from typing import Any

from liaoyuan.errors import LiaoyuanError, nearest
from liaoyuan.models.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from liaoyuan.models.families.family import Family
from liaoyuan.models.families.glm import GLM, GLM4, GLM4_MOE
from liaoyuan.models.families.gpt_oss import GPT_OSS
from liaoyuan.models.families.llama import LLAMA, MISTRAL
from liaoyuan.models.families.mixtral import MIXTRAL
from liaoyuan.models.families.qwen import QWEN2, QWEN3, QWEN3_MOE

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LLAMA,
        MISTRAL,
        MIXTRAL,
        QWEN2,
        QWEN3,
        QWEN3_MOE,
        DEEPSEEK_V2,
        DEEPSEEK_V3,
        GLM,
        GLM4,
        GLM4_MOE,
        GPT_OSS,
    )
}


def family_of(values: Mapping[str, Any], where: str) -> Family:
    """Return the family that a `config.json` names; LiaoyuanError if we do not know it."""
    name = str(values.get("model_type"))
    if name not in FAMILIES:
        hint = nearest(name, list(FAMILIES))
        raise LiaoyuanError(f"{where}: model_type '{name}' is not supported ({', '.join(FAMILIES)} are){hint}")
    return FAMILIES[name]
