"""What a cache depends on."""

from lifelong_jax.datasets import cache


def test_another_way_of_decoding_another_setting_or_another_file_has_another_cache(tmp_path, monkeypatch):
    file = tmp_path / "image.png"
    file.write_bytes(b"pixels")

    def name(*settings):
        return cache.cache_file("folder", settings, [file])

    names = [name("a", 8), name("a", 9)]
    file.write_bytes(b"other pixels")
    names.append(name("a", 8))
    assert names[-1] == name("a", 8)
    for module, attribute in ((cache, "_DECODING"), (cache.PIL, "__version__")):
        with monkeypatch.context() as patch:
            patch.setattr(module, attribute, "another")
            names.append(name("a", 8))
    assert len(set(names)) == 5
    assert {path.parent for path in names} == {tmp_path / "cache"}
