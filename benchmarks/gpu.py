from typing import Any


def gpu_section(subject: Any) -> None:
    return None
