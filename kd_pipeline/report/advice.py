"""Which settings change what takes most of the time of a training step, in the words of benchmarks and reports."""

__all__ = ["advice_for"]


def advice_for(part: str, share: str, *, gains_from_bf16: bool, is_compiled: bool) -> str:
    """A sentence about the part of a step that takes most of the time.

    Args:
        part: `loader`, `teacher`, or a part of the student's own work, such as `student` or `backward`.
        share: how much of which time it takes, such as `In (e) 61% of the time goes into`.
        gains_from_bf16: whether the student trains in float32, and would be faster in bfloat16.
        is_compiled: whether the student is compiled.
    """
    if part == "teacher":
        return (
            f"{share} the teacher: try another teacher.precision, take a smaller teacher, or with few epochs record "
            "its outputs once with kd-pipeline record"
        )
    if part == "loader":
        return (
            f"{share} waiting for the loader: raise data.num_threads up to the number of cores, lower transform.size, "
            "store smaller images, or on a GPU raise data.ahead"
        )
    faster = "set train.precision to bf16-mixed, or " if gains_from_bf16 else ""
    compiled = "train.compile is worth its time, as here" if is_compiled else "train.compile may be worth its time"
    return (
        f"{share} the {part}, which no loader and no teacher can change: {faster}take a smaller student or smaller "
        f"images; {compiled}"
    )
