defmodule StarweaveImage.RoomsTest do
  # Who may know whom. The table of docs/architecture.md is the rule itself: it is read here.
  use ExUnit.Case, async: true

  import ExUnit.CaptureIO

  @document "docs/architecture.md"

  setup_all do
    [table] =
      Regex.run(~r/^### Elixir\n(.*?)^##/ms, File.read!(@document), capture: :all_but_first)

    rooms =
      for [room, files, known] <-
            Regex.scan(~r/^\| (\w+) \| (`.*`) \| (.*) \|$/m, table, capture: :all_but_first),
          do: {room, files(files), String.split(known, [", ", "nothing"], trim: true)}

    references = references()
    home = for {room, files, _known} <- rooms, file <- files, into: %{}, do: {file, room}
    %{rooms: rooms, home: home, references: references}
  end

  test "each file is in one room, and each room rests on those above it", context do
    placed = Enum.flat_map(context.rooms, fn {_room, files, _known} -> files end)
    assert Path.wildcard("lib/**/*.ex") -- placed == [], "in no room of #{@document}"
    assert placed -- Path.wildcard("lib/**/*.ex") == [], "in two rooms of #{@document}"

    for {{room, files, known}, place} <- Enum.with_index(context.rooms) do
      above = for {other, _, _} <- Enum.take(context.rooms, place), do: other
      assert {room, known -- above} == {room, []}
      assert files != [], "the room #{room} of #{@document} is empty"
    end
  end

  test "no file refers to one of a room that its own may not know", %{home: home} = context do
    allowed = for {room, _, known} <- context.rooms, into: %{}, do: {room, [room | known]}

    broken =
      for {file, others} <- context.references,
          other <- others,
          home[other] not in Map.get(allowed, home[file], []) do
        "\n  #{file} (#{home[file]}) refers to #{other} (#{home[other]})"
      end

    assert broken == [], "against the rooms of #{@document}:#{broken}"
  end

  test "no files refer to each other in a circle", %{references: references} do
    graph = :digraph.new()
    for {file, _others} <- references, do: :digraph.add_vertex(graph, file)
    for {file, others} <- references, other <- others, do: :digraph.add_edge(graph, file, other)

    circles = for [_, _ | _] = circle <- :digraph_utils.strong_components(graph), do: circle
    assert circles == []
  end

  defp files(patterns) do
    for [pattern] <- Regex.scan(~r/`([^`]+)`/, patterns, capture: :all_but_first),
        file <- "lib" |> Path.join(pattern) |> Path.wildcard(),
        do: file
  end

  # The files of the library, each with those that it refers to as the compiler saw it: by calls, macros, structs, names.
  defp references do
    lines = capture_io(fn -> Mix.Task.rerun("xref", ["graph", "--format", "plain"]) end)

    references =
      for line <- String.split(lines, "\n", trim: true), reduce: [] do
        references ->
          case {Regex.run(~r/^([|`]-- )?(\S+\.ex)(?: \(\w+\))?$/, line), references} do
            {[_, "", file], _} -> [{file, []} | references]
            {[_, _sign, other], [{file, others} | rest]} -> [{file, [other | others]} | rest]
          end
      end

    references = for {"lib/" <> _, _others} = entry <- references, do: entry
    # Otherwise what is printed has changed, and the tests would see nothing.
    assert references |> Enum.map(&elem(&1, 0)) |> Enum.sort() ==
             Enum.sort(Path.wildcard("lib/**/*.ex"))

    assert Enum.any?(references, fn {_file, others} -> others != [] end)
    references
  end
end
