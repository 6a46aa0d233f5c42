defmodule StarweaveImage.PlacesTest do
  use ExUnit.Case, async: true

  alias StarweaveImage.Request
  alias StarweaveImage.Queue.{Job, Places, Schedule}

  defp schedule(ids) do
    schedule = Schedule.new(max_queue: 10, max_queue_bytes: 1_000)
    Enum.reduce(ids, schedule, &Schedule.push(&2, &1, :waiting, model: "m"))
  end

  defp job(id, fields \\ []),
    do: struct!(%Job{request: %Request{id: id, prompt: "a fig", seed: 1}}, fields)

  defp running(schedule) do
    schedule = Schedule.sidecar(schedule, 1, open?: true, capacity: 1)
    {:run, id, 1, schedule} = Schedule.next(schedule)
    {id, schedule}
  end

  test "an event tells place, attempt and about when" do
    assert {:queued, %{position: 2, attempt: 1, estimated_start_ms: nil}} =
             Places.event(schedule(~w(a b)), "b")

    {"a", schedule} = running(schedule(~w(a b)))
    assert {:queued, %{position: 1, estimated_start_ms: ms}} = Places.event(schedule, "b")
    assert is_integer(ms)
  end

  test "who comes late is told the place of what waits, how far it is of what runs, and of what ends nothing" do
    {"a", schedule} = running(schedule(~w(a b)))
    assert [{:queued, %{position: 1}}] = Places.late(schedule, job("b"))

    told =
      job("a", progress: %{0 => %{image: 0, step: 3}}, previews: %{0 => %{image: 0, data: "x"}})

    assert Places.late(schedule, told) == [
             preview: %{image: 0, data: "x"},
             progress: %{image: 0, step: 3}
           ]

    assert Places.late(schedule, job("b", status: :ending)) == []
  end

  test "news are the places that watchers do not know yet" do
    schedule = schedule(~w(a b c))

    jobs = %{
      "a" => job("a"),
      "b" => job("b", subscribers: [:me], told: 2),
      "c" => job("c", subscribers: [:me], told: 4)
    }

    assert {[%{request: %{id: "c"}}], true} = Places.news(schedule, jobs)
    {"a", schedule} = running(schedule)
    assert {news, true} = Places.news(schedule, jobs)
    assert Enum.map(news, & &1.request.id) == ["b", "c"]
    assert Places.news(schedule, %{"b" => job("b")}) == {[], false}
  end
end
