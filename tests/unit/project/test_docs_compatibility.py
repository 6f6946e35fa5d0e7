"""docs/compatibility.md says what the code offers, and names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vswitch.fastpath.shared.words import DROP_REASONS
from vswitch.ports.features import FEATURES as PORT_FEATURES
from vswitch.ports.offloads import offered
from vswitch.vhost_user.net import PROTOCOL_FEATURES
from vswitch.vhost_user.protocol import REQUESTS, Feature, ProtocolFeature, Request

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs" / "compatibility.md").read_text()
FEATURES = TEXT.partition("## Protocol features")[2].partition("\n## ")[0]
VIRTIO = TEXT.partition("## Virtio features")[2].partition("\n## ")[0]
FEATURE_ROW = re.compile(r"^\| (\d+) \| (\w+) \| (yes|no)", re.MULTILINE)
MESSAGES = TEXT.partition("## Messages of the frontend")[2].partition("\n## ")[0]
MESSAGE_ROW = re.compile(r"^\| (\d+)(?:(?:, | to )(\d+))? \| [^|]+ \| (\w+)", re.MULTILINE)


def test_every_protocol_feature_has_a_true_row() -> None:
    rows = {int(bit): (name, said) for bit, name, said in FEATURE_ROW.findall(FEATURES)}
    assert rows == {
        feature.bit_length() - 1: (feature.name, "yes" if feature in PROTOCOL_FEATURES else "no")
        for feature in ProtocolFeature
    }


def test_every_virtio_feature_has_a_true_row() -> None:
    all_of_them = PORT_FEATURES | offered(True) | Feature.PROTOCOL_FEATURES | Feature.LOG_ALL
    rows = {int(bit): (name, said) for bit, name, said in FEATURE_ROW.findall(VIRTIO)}
    assert rows == {
        feature.bit_length() - 1: (feature.name, "yes" if feature in all_of_them else "no")
        for feature in Feature
    }


def test_every_message_has_a_true_row() -> None:
    said = {}
    for first, last, supported in MESSAGE_ROW.findall(MESSAGES):
        for number in range(int(first), int(last or first) + 1):
            said[number] = supported != "no"
    assert said == {request: request in REQUESTS for request in Request}


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:unit|conformance|e2e)/\S+)`", TEXT))))
def test_named_tests_exist(path: str) -> None:
    assert list((ROOT / "tests").glob(path))


def test_every_drop_reason_is_explained() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text.partition("\n## Drops\n")[2]
    explained = re.findall(r"^\| `([\w-]+)` \| (?:in|e)gress \| (.+) \|$", table, re.MULTILINE)
    assert [name for name, _ in explained] == [name for name, _ in DROP_REASONS]
    for (name, said), (_, meaning) in zip(explained, DROP_REASONS, strict=True):
        assert said.startswith(meaning), name
