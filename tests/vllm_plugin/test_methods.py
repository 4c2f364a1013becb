"""Methods that are given back after a replacement."""

from __future__ import annotations

from normquant.vllm.methods import give_back


class Owner:
    def forward(self) -> str:
        return "of the class"


def test_a_method_of_the_class_is_found_there_again() -> None:
    owner = Owner()
    stock = owner.forward
    owner.forward = lambda: "replaced"  # type: ignore[method-assign]
    give_back(owner, "forward", stock)
    assert owner.forward() == "of the class" and "forward" not in vars(owner)
    give_back(owner, "forward", stock)
    assert owner.forward() == "of the class", "given back already"


def test_a_method_that_somebody_else_put_on_the_instance_is_put_there_again() -> None:
    owner = Owner()
    owner.forward = theirs = lambda: "of somebody else"  # type: ignore[method-assign]
    owner.forward = lambda: "replaced"  # type: ignore[method-assign]
    give_back(owner, "forward", theirs)
    assert owner.forward is theirs
