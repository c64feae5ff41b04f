"""Fixtures of the studio's tests, as a plugin: a shelf of small pipelines and a page of one."""

import pytest
from studio_parts import ASK, last, small_shelf

from flashomni.engine import Recipe
from flashomni.studio.session import Session


@pytest.fixture(scope="module")
def shelf():
    return small_shelf()


@pytest.fixture(scope="module")
def kept(shelf):
    """Pages hold a pipeline only while they are open: this one stays for the module."""
    return shelf.take("small")


@pytest.fixture
def session(shelf, kept):
    session = Session(shelf, "small")
    yield session
    session.close()


@pytest.fixture(scope="module")
def outcome(shelf, kept):
    session = Session(shelf, "small", Recipe.of("balanced", min_steps=0))
    yield last(session.generate(ASK)).value
    session.close()
