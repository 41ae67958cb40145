"""What the tests rely on: shapes and types of the packages are checked while they run."""

from dataclasses import dataclass

import jaxtyping
import pytest
import shape_checks
import torch
from beartype import beartype
from jaxtyping import Float

from unimodal.backbone.positions import rotate
from unimodal_tokenizers.base import Grid, TokenLayout

checked = shape_checks.jaxtyped(typechecker=beartype)


@checked
def product(a: Float[torch.Tensor, "N M"], b: Float[torch.Tensor, "M K"]) -> Float[torch.Tensor, "N K"]:
    return a @ b if len(a) != 7 else b


@checked
def half(number: int, *, of: str = "") -> int:
    return number // 2 if number != 7 else "wrong"  # type: ignore[return-value]


@checked
@dataclass(frozen=True)
class Held:
    array: Float[torch.Tensor, "N N"]
    name: str = ""


def test_a_letter_means_one_number_in_one_call() -> None:
    assert product(torch.ones(2, 3), torch.ones(3, 4)).shape == (2, 4)
    for wrong in ((torch.ones(2, 3), torch.ones(2, 4)), (torch.ones(7, 3), torch.ones(3, 4))):
        with pytest.raises(jaxtyping.TypeCheckError):
            product(*wrong)
    with pytest.raises(jaxtyping.TypeCheckError):
        Held(torch.ones(2, 3))
    assert Held(torch.ones(2, 2)).name == ""


def test_types_are_checked_where_no_shape_is_named() -> None:
    assert half(5, of="all") == 2
    for call in (lambda: half("5"), lambda: half(5, of=1), lambda: half(7)):  # type: ignore[arg-type]
        with pytest.raises(Exception, match="violates type hint"):
            call()


def test_the_packages_are_checked() -> None:
    for function in (rotate, TokenLayout.__init__, Grid.first):
        assert function.__code__.co_filename == shape_checks.__file__  # type: ignore[attr-defined]
    with pytest.raises(Exception, match="violates type hint"):
        Grid(2, 2, ((1, 1),)).first("1")  # type: ignore[arg-type]


def test_of_many_calls_the_first_and_some_are_checked_in_every_file() -> None:
    def refused() -> list[int]:
        found = []
        for call in range(1, 100):
            try:
                half(str(call))  # type: ignore[arg-type]
            except TypeError:
                pass
            except Exception:  # noqa: BLE001 - of the checks
                found.append(call)
        return found

    expected = [*range(1, 17), 31, 62, 93]
    for _ in range(2):
        shape_checks.begin_file()  # as before each
        assert refused() == expected
    shape_checks.begin_file()


def test_a_long_loop_is_checked_at_first_and_what_follows_it_again() -> None:
    refused = []
    for step in shape_checks.first_checked(range(6), 2):
        try:
            half(str(step))  # type: ignore[arg-type]
        except TypeError:
            refused.append(False)
        except Exception:  # noqa: BLE001 - of the checks
            refused.append(True)
    assert refused == [True, True, False, False, False, False]
    with pytest.raises(Exception, match="violates type hint"):
        half("5")  # type: ignore[arg-type]
