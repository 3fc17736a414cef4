"""Passwords in addresses: never shown, never kept."""

from search.address import masked, password, shown

SECRET = "postgresql+psycopg://me:hunter2@db.example/compareto"  # noqa: S105  nobody's


def test_an_address_is_shown_without_its_password() -> None:
    assert shown(SECRET) == "postgresql+psycopg://me:***@db.example/compareto"
    assert shown("sqlite:///runs/optuna.db") == "sqlite:///runs/optuna.db"
    assert shown("no address at all") == "no address at all"
    assert "hunter2" not in shown("postgresql://h/x?user=me&password=hunter2")
    assert shown("postgresql//me:hunter2@h/x") == "postgresql//***@h/x"
    assert shown("postgresql://me:hunter2@h:54x/x") == "postgresql://***@h:54x/x"


def test_a_message_that_quotes_the_password_loses_it() -> None:
    assert masked("cannot connect as me with hunter2", SECRET) == "cannot connect as me with ***"
    assert masked("plain", "sqlite:///x") == "plain"


def test_a_password_that_addresses_must_spell_otherwise_is_not_shown_either() -> None:
    odd = "postgresql+psycopg://me:p%40s+s@db.example/compareto"
    assert password(odd) == "p@s+s"
    assert masked(f"cannot reach {odd}", odd) == "cannot reach postgresql+psycopg://me:***@db.example/compareto"
    assert shown("postgresql://h/x?user=me&password=p%40ss") == "postgresql://h/x?password=***&user=me"


def test_a_password_is_found_where_there_is_one() -> None:
    assert password(SECRET) == "hunter2"
    assert password("postgresql://h/x?user=me&password=hunter2") == "hunter2"
    assert password("sqlite:///x") is None
    assert password("no address at all") is None
