defmodule StarweaveImage.OutputTest do
  # Where images go, by the cases of the contract.
  use ExUnit.Case, async: true

  import Bitwise

  alias StarweaveImage.{Contract, Output, TestOutput}

  doctest Output
  doctest TestOutput

  @moduletag :tmp_dir
  @moduletag timeout: 120_000

  # A test a case, but one body for all.
  for test <- Contract.load("outputs.jsonl") do
    @tag contract: test
    test(test["name"], %{contract: test, tmp_dir: folder}, do: run(test, folder))
  end

  defp run(%{"format" => wanted, "out" => out}, _folder) do
    expected =
      if wanted in ~w(png jpeg webp), do: {:ok, String.to_atom(wanted)}, else: {:error, wanted}

    assert Output.format(out) == expected
  end

  defp run(test, folder) do
    test = filled(test, folder)
    {before, expected} = {test["before"], Map.merge(test["before"], test["after"])}
    make(folder, before)

    reader =
      if test["read"], do: Task.async(fn -> System.cmd("cat", [Path.join(folder, "x.png")]) end)

    out = if test["out"] == "-", do: "-", else: in_folder(test["out"], folder)
    size = if test["error"], do: 200_000, else: 3
    said = attempt(test, out, test["count"] || 1, test["preview"] || false, size)
    assert said == (test["refusal"] || test["error"] || "ok")
    # Nothing else is left behind.
    assert names(folder) == Enum.sort(Map.keys(expected))
    for {name, entry} <- expected, do: check(Path.join(folder, name), entry, before)
    if reader, do: assert(Task.await(reader, 60_000) == {test["read"], 0})
  end

  defp in_folder("/" <> _ = out, _folder), do: out
  # Path.join would take a slash from the end.
  defp in_folder(out, folder), do: folder <> "/" <> out

  defp attempt(test, out, count, preview?, size) do
    plain =
      if test["plain_user"] && root?(),
        do: ["setpriv", "--bounding-set=-dac_override,-dac_read_search"],
        else: []

    room = if test["room"], do: ["prlimit", "--fsize=#{test["room"]}:unlimited"], else: []

    if test["plain_user"] || test["room"],
      do: TestOutput.attempt_under(plain ++ room, out, count, preview?, size),
      else: TestOutput.attempt(out, count, preview?, size)
  end

  defp root?, do: System.cmd("id", ["-u"]) == {"0\n", 0}

  defp filled(term, folder) when is_binary(term),
    do:
      term
      |> String.replace("FOLDER", folder)
      |> String.replace("FULL", String.duplicate("n", 251))

  defp filled(map, folder) when is_map(map),
    do: Map.new(map, fn {key, item} -> {filled(key, folder), filled(item, folder)} end)

  defp filled(term, _folder), do: term

  # By name, so that a folder comes before what is in it; other names of files, and the modes of folders, at last.
  defp make(folder, entries) do
    entries = Enum.sort_by(entries, fn {name, entry} -> {match?(%{"same" => _}, entry), name} end)
    for {name, entry} <- entries, do: make_entry(Path.join(folder, name), entry)

    for {name, %{"folder" => mode}} <- entries,
        do: File.chmod!(Path.join(folder, name), String.to_integer(mode, 8))
  end

  defp make_entry(path, "pipe"), do: {_, 0} = System.cmd("mkfifo", [path])

  defp make_entry(path, "socket") do
    # By a short name: the path of a socket has little room.
    short = Path.join("/tmp", "swi-#{System.pid()}-#{System.unique_integer([:positive])}")
    {:ok, socket} = :gen_tcp.listen(0, ifaddr: {:local, short})
    File.rename!(short, path)
    :gen_tcp.close(socket)
  end

  defp make_entry(path, text) when is_binary(text), do: File.write!(path, text)
  defp make_entry(path, %{"folder" => _}), do: File.mkdir!(path)
  defp make_entry(path, %{"link" => to}), do: File.ln_s!(to, path)
  defp make_entry(path, %{"same" => to}), do: File.ln!(Path.join(Path.dirname(path), to), path)

  defp make_entry(path, %{"text" => text, "mode" => mode}) do
    File.write!(path, text)
    File.chmod!(path, String.to_integer(mode, 8))
  end

  defp names(folder) do
    Enum.sort(
      for name <- File.ls!(folder),
          path = Path.join(folder, name),
          below = if(File.lstat!(path).type == :directory, do: names(path), else: []),
          name <- [name | Enum.map(below, &Path.join(name, &1))],
          do: name
    )
  end

  defp check(path, entry, _before) when entry in ~w(pipe socket) do
    type = if entry == "pipe", do: 0o010000, else: 0o140000
    assert (File.lstat!(path).mode &&& 0o170000) == type
  end

  defp check(path, %{"folder" => mode}, _before) do
    assert (File.stat!(path).mode &&& 0o7777) == String.to_integer(mode, 8)
    File.chmod!(path, 0o755)
  end

  defp check(path, %{"link" => to}, _before), do: assert(File.read_link!(path) == to)
  defp check(path, %{"same" => to}, before), do: assert(File.read!(path) == before[to])

  defp check(path, %{"text" => text, "mode" => mode}, _before) do
    assert {File.read!(path), File.lstat!(path).mode &&& 0o7777} ==
             {text, String.to_integer(mode, 8)}
  end

  defp check(path, text, _before),
    do: assert({File.lstat!(path).type, File.read!(path)} == {:regular, text})
end
