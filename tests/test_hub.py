"""Without the Hugging Face hub, models are looked for on disk and errors come at once."""

from __future__ import annotations

import pytest
from huggingface_hub import constants

from occfeat_targets.common.hub import use_cache_without_hub
from occfeat_targets.targets.teacher import TeacherError, teacher_spec
from occfeat_train.networks.encoder import ImageEncoder
from occfeat_train.networks.encoder_weights import load_backbone_weights


class Session:
    """A session of huggingface_hub that counts its requests, and fails if `error` is set."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.requests = error, 0

    def head(self, url: str, timeout: float) -> None:
        assert url == constants.ENDPOINT and timeout <= 5
        self.requests += 1
        if self.error is not None:
            raise self.error


@pytest.fixture
def session(monkeypatch) -> Session:
    session = Session(RuntimeError("no route to host"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: session)
    return session


def test_a_hub_that_answers_is_used(session):
    session.error = None
    use_cache_without_hub()
    assert not constants.HF_HUB_OFFLINE and session.requests == 1


def test_a_hub_that_does_not_answer_is_asked_once_and_named_in_a_warning(session, caplog):
    for _ in range(2):
        use_cache_without_hub()
    assert constants.HF_HUB_OFFLINE and session.requests == 1
    (line,) = caplog.messages
    assert line == f"{constants.ENDPOINT} is not reached (no route to host): only files in its cache on disk are used"


def test_teacher_and_backbone_fail_after_one_request_with_the_remedy(session):
    with pytest.raises(TeacherError, match="run 'hf download nobody/nothing'"):
        teacher_spec("nobody/nothing")
    with pytest.raises(ValueError, match="run 'hf download nobody/nothing'"):
        load_backbone_weights(ImageEncoder("efficientnet-b0", 8), "nobody/nothing")
    assert session.requests == 1


def test_a_local_folder_asks_nobody(session, tiny_teacher):
    teacher_spec(tiny_teacher)
    assert session.requests == 0
