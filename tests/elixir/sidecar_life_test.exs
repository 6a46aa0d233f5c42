defmodule StarweaveImage.SidecarLifeTest do
  use ExUnit.Case, async: true

  alias StarweaveImage.Sidecar.Life

  @states ~w(resting started greeted ready condemned)a
  # In the order of the table in docs/architecture.md.
  @events [
    :started,
    :heartbeat,
    {:ready, :what_it_says},
    {:complaint, "no model"},
    {:stalls, "no heartbeat"},
    {:fails, "it sent junk"},
    {:ended, "it was killed", :killed},
    :stable
  ]
  @others [{:ended, "it ended by itself", :otherwise}]
  @most 1_000

  defp new, do: Life.new({10, @most})

  defp play(events, life \\ new()) do
    Enum.reduce(events, life, fn event, life ->
      {_actions, life} = Life.next(life, event)
      life
    end)
  end

  # The least that leads there.
  defp in_state(:resting), do: new()
  defp in_state(:started), do: play([:started])
  defp in_state(:greeted), do: play([:started, :heartbeat])
  defp in_state(:ready), do: play([:started, :heartbeat, {:ready, :what_it_says}])
  defp in_state(:condemned), do: play([{:stalls, "no heartbeat"}], in_state(:ready))

  defp name(action) when is_atom(action), do: action
  defp name(action), do: elem(action, 0)

  describe "the table in docs/architecture.md" do
    test "says what each event makes of each state" do
      document = File.read!(Path.expand("../../docs/architecture.md", __DIR__))
      [_, section] = String.split(document, "## The life of a sidecar\n")
      [section | _] = String.split(section, "\n## ")

      ["| Event | " <> head, _line | rows] =
        for "|" <> _ = line <- String.split(section, "\n"), do: line

      assert cells(head) == Enum.map(@states, &Atom.to_string/1)
      assert length(rows) == length(@events)

      for {row, event} <- Enum.zip(rows, @events),
          {cell, state} <- Enum.zip(tl(cells(row)), @states) do
        {actions, life} = Life.next(in_state(state), event)

        told =
          case Enum.map(actions, &name/1) do
            [] when life.state == state and (state != :ready or event != :stable) -> "–"
            [] -> "#{life.state}"
            [action] -> "#{life.state}, `#{action}`"
          end

        assert cell == told, "#{inspect(event)} in #{state}: #{told}, and the table says #{cell}"
      end
    end

    defp cells(row), do: row |> String.split("|", trim: true) |> Enum.map(&String.trim/1)
  end

  test "whatever happens, in whatever order, is defined, and keeps what is promised" do
    for _ <- 1..2_000, reduce: {new(), []} do
      {life, past} ->
        # A process that works is long-lived: many a walk should come to an end without one as well.
        event = Enum.random(@events ++ @others ++ [:started, :heartbeat])
        {actions, next} = Life.next(life, event)
        past = [event | past]
        assert next.state in @states, inspect(Enum.reverse(past))

        # Whoever is condemned is killed, once, and heard no more until it has ended.
        assert :kill in actions == (next.state == :condemned and life.state != :condemned)
        if life.state == :condemned, do: assert(next.state in [:condemned, :resting])
        # Greeted once, when it is first heard.
        assert :greet in actions == (life.state == :started and event == :heartbeat)
        # A start follows each end.
        rests = for {:rest, sentence, pause, _news?} <- actions, do: {sentence, pause}
        assert length(rests) == if(match?({:ended, _, _}, event), do: 1, else: 0)
        for {sentence, pause} <- rests, do: assert(is_binary(sentence) and pause in 0..@most)
        # Down is left by `ready` alone, and entered by the end of a process that never was.
        if Life.phase(life) == :down and Life.phase(next) != :down,
          do: assert(match?({:ready, _}, event) or Life.phase(next) == :stalled)

        if Life.phase(next) == :down and Life.phase(life) not in [:down, :stalled],
          do: assert(match?({:ended, _, _}, event) and not life.ready?)

        if life.ready? and rests != [], do: assert(Life.phase(next) == :starting)
        {next, past}
    end
  end

  describe "patience" do
    # The phase after each of `count` starts that end so.
    defp phases(life, count, events) do
      {phases, _} =
        Enum.map_reduce(1..count, life, fn _, life ->
          life = play([:started | events], life)
          {Life.phase(life), life}
        end)

      phases
    end

    @killed {:ended, "it was killed", :killed}
    @failed {:ended, "it ended", :otherwise}

    test "is none before the first `ready`" do
      assert phases(new(), 2, [@killed]) == [:down, :down]
    end

    test "is for two failed starts after one, and for eight that are killed from outside" do
      worked = play([@killed], in_state(:ready))
      assert Life.phase(worked) == :starting
      assert phases(worked, 4, [@failed]) == [:starting, :starting, :down, :down]
      assert phases(worked, 9, [:heartbeat, @killed]) == List.duplicate(:starting, 8) ++ [:down]
      # One that says what is wrong with it has failed, whoever ends it.
      assert phases(worked, 3, [{:complaint, "no model"}, @killed]) == [
               :starting,
               :starting,
               :down
             ]

      # So has one that had to be killed by us.
      assert phases(worked, 3, [{:stalls, "silence"}, @killed]) == [:starting, :starting, :down]
    end

    test "is full again after the next `ready`" do
      down = play([:started, @killed])
      assert Life.phase(play([:started, :heartbeat], down)) == :down
      up = play([:started, {:ready, 1}], down)
      assert Life.phase(up) == :ready
      assert phases(play([@failed], up), 2, [@failed]) == [:starting, :starting]
    end
  end

  describe "the pause before the next start" do
    defp pause(life, event) do
      {actions, _} = Life.next(life, event)
      [pause] = for {:rest, _, pause, _} <- actions, do: pause
      pause
    end

    test "is none after one that had worked, and grows where it ends again before it is stable" do
      assert pause(in_state(:ready), @failed) == 0
      again = play([@failed, :started, {:ready, 1}], in_state(:ready))
      assert pause(again, @failed) in 5..10
      assert pause(play([@failed, :started, {:ready, 1}], again), @failed) in 10..20
      assert pause(play([:stable], again), @failed) == 0
    end

    test "grows with each start that fails" do
      assert pause(play([:started]), @failed) in 5..10
      assert pause(play([:started, @failed]), @failed) in 10..20
      assert pause(play(List.duplicate(@failed, 50)), @failed) in 500..1_000
    end
  end

  describe "what is told of an end" do
    defp told(events, life \\ new()) do
      {before, [last]} = Enum.split(events, -1)
      {actions, _} = before |> play(life) |> Life.next(last)
      [told] = for {:rest, sentence, _, news?} <- actions, do: {sentence, news?}
      told
    end

    test "is why it was condemned, or else its own words, or else how it ended" do
      assert told([:started, @failed]) == {"it ended", true}
      assert told([:started, {:complaint, "no model"}, @failed]) == {"no model", true}

      assert told([:started, {:complaint, "no model"}, {:fails, "too late"}, @failed]) ==
               {"too late", true}

      # What it says of its work is not why it ends.
      assert told([:started, {:ready, 1}, {:complaint, "no model"}, @failed]) ==
               {"it ended", true}

      # Nor is what an earlier one said.
      assert told([:started, {:complaint, "no model"}, @failed, :started, @killed]) ==
               {"it was killed", true}
    end

    test "is no news where the start before it failed alike" do
      assert told([@failed, @failed]) == {"it ended", false}
      assert told([@failed, @killed]) == {"it was killed", true}
      assert told([@failed, :started, {:ready, 1}, @failed]) == {"it ended", true}
      {[{:complain, "no", news?}], _} = Life.next(play([:started]), {:complaint, "no"})
      assert news?
      failed = play([:started, {:complaint, "no"}, @failed, :started])
      assert {[{:complain, "no", false}], _} = Life.next(failed, {:complaint, "no"})
    end
  end

  test "the phase of one that hangs is `stalled` until it is gone" do
    assert Life.phase(in_state(:condemned)) == :stalled
    assert Life.phase(play([{:fails, "junk"}], in_state(:ready))) == :ready
    assert Life.phase(play([@killed], in_state(:condemned))) == :starting
  end
end
