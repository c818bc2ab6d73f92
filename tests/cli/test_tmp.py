def test_a(capsys):
    print("x")
    assert capsys.readouterr().out
