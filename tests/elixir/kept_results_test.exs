defmodule StarweaveImage.KeptResultsTest do
  use ExUnit.Case, async: true

  alias StarweaveImage.{Image, Request}
  alias StarweaveImage.Queue.{Job, Results}

  defp new(options \\ []),
    do: Results.new(Keyword.merge([max_results: 3, max_result_bytes: 100], options))

  defp job(id, result \\ {:ok, []}),
    do: Job.ended(%Job{request: %Request{id: id, prompt: "a fig", seed: 1}, result: result})

  defp stored(id), do: job(id, {:stored, :ok})

  defp images(bytes) do
    facts = %{id: "a", format: :png, width: 64, height: 64, sha256: ""}
    {:ok, [struct!(Image, Map.put(facts, :data, :binary.copy("x", bytes)))]}
  end

  defp ids(jobs), do: Enum.map(jobs, & &1.request.id)

  defp keep(results, job, until) do
    {gone, results} = Results.keep(results, job, until)
    {ids(gone), results}
  end

  describe "what is kept" do
    test "goes when its time is over, in that order" do
      {[], results} = keep(new(), job("late"), 30)
      {[], results} = keep(results, job("soon"), 10)
      {[], results} = keep(results, job("then"), 20)
      assert Results.next_expiry(results) == 10
      assert {[], ^results} = Results.expire(results, 9)
      assert {gone, results} = Results.expire(results, 20)
      assert ids(gone) == ["soon", "then"]
      assert %Job{} = Results.get(results, "late")
      assert {[_], results} = Results.expire(results, 30)
      assert Results.next_expiry(results) == nil
      assert {[], _} = keep(results, job("huge", images(100)), 40)
    end

    test "is so many at most, and those go first whose time ends first" do
      {[], results} = keep(new(), job("b"), 20)
      {[], results} = keep(results, job("a"), 10)
      {[], results} = keep(results, job("c"), 30)
      assert {["a"], results} = keep(results, job("d"), 40)
      # Of two that ended in the same moment, the younger one stays.
      assert {["b"], same} = keep(results, job("a"), 40)
      assert {["c"], same} = keep(same, job("0"), 40)
      assert {["d"], _same} = keep(same, job("1"), 40)
      # One of an earlier life that was nearly over does not stay at the cost of others.
      assert {["old"], results} = keep(results, job("old"), 5)
      assert Results.get(results, "old") == nil
    end

    test "is so many bytes at most" do
      {[], results} = keep(new(), job("a", images(40)), 10)
      {[], results} = keep(results, job("b", images(40)), 20)
      assert {["a"], results} = keep(results, job("c", images(60)), 30)
      assert {["b", "c", "huge"], results} = keep(results, job("huge", images(101)), 40)
      assert {[], _} = keep(results, job("d", images(100)), 50)
    end

    test "of an id that ended before is the younger one alone" do
      {[], results} = keep(new(), job("a", images(60)), 10)
      assert {[], results} = keep(results, job("a", images(60)), 20)
      assert {[], results} = Results.expire(results, 10)
      assert {[_one], _} = Results.expire(results, 20)
      assert {%Job{}, results} = Results.drop(results, "a")
      assert {nil, ^results} = Results.drop(results, "a")
      assert {[], _} = keep(results, job("huge", images(100)), 40)
    end

    test "adds up, whatever comes and goes" do
      for _ <- 1..300, reduce: {new(), 0} do
        {results, now} ->
          id = Enum.random(~w(a b c d e))

          {gone, results} =
            case :rand.uniform(4) do
              1 ->
                Results.expire(results, now)

              2 ->
                results |> Results.drop(id) |> then(fn {job, r} -> {List.wrap(job), r} end)

              _ ->
                Results.keep(results, job(id, images(:rand.uniform(60))), now + :rand.uniform(9))
            end

          kept = for id <- ~w(a b c d e), job = Results.get(results, id), do: job
          assert length(kept) <= 3
          assert kept |> Enum.map(&Job.bytes/1) |> Enum.sum() <= 100
          assert Results.next_expiry(results) == nil == (kept == [])
          for job <- gone, do: assert(job not in kept)
          {results, now + 1}
      end
    end
  end

  describe "who asks" do
    test "is given what is at hand, and nobody else is told" do
      {[], results} = keep(new(), job("a"), 10)

      assert {:deliver, %{waiters: [:me], subscribers: []}} =
               Results.ask(results, "a", {:waiter, :me})

      assert {:deliver, %{waiters: [], subscribers: [:me]}} =
               Results.ask(results, "a", {:subscriber, :me})
    end

    test "for what is on disk only waits until somebody has read it, once for all" do
      {[], results} = keep(new(), stored("a"), 10)
      assert {:read, results} = Results.ask(results, "a", {:waiter, :one})
      results = Results.begin_reading(results, "a", :reader)
      assert {:wait, results} = Results.ask(results, "a", {:subscriber, :two})
      assert {:wait, results} = Results.ask(results, "a", {:subscriber, :two})
      assert {:wait, results} = Results.ask(results, "a", {:subscriber, :three})
      results = Results.leave(results, "a", :three)
      assert [%{waiters: [:one], subscribers: [:two]}] = Results.being_read(results)

      assert {%{waiters: [:one], subscribers: [:two]}, results} =
               Results.end_reading(results, :reader)

      assert Results.being_read(results) == []
      # Read anew for the next: the image is not kept in memory.
      assert {:read, results} = Results.ask(results, "a", {:waiter, :four})
      results = Results.begin_reading(results, "a", :next)
      assert {%{waiters: [:four], subscribers: []}, _} = Results.end_reading(results, :next)
    end

    test "still waits where the reader ended before he had read" do
      {[], results} = keep(new(), stored("a"), 10)
      assert {:read, results} = Results.ask(results, "a", {:waiter, :one})
      results = Results.begin_reading(results, "a", :reader)
      assert {"a", results} = Results.lose_reader(results, :reader)
      assert {nil, ^results} = Results.lose_reader(results, :stranger)
      results = Results.begin_reading(results, "a", :second)
      assert {nil, results} = Results.end_reading(results, :reader)
      assert {%{waiters: [:one]}, _} = Results.end_reading(results, :second)
    end

    test "is with what has to go, and nobody reads that any more" do
      {[], results} = keep(new(), stored("a"), 10)
      {:read, results} = Results.ask(results, "a", {:waiter, :one})
      results = Results.begin_reading(results, "a", :reader)
      assert {[%{waiters: [:one]}], results} = Results.expire(results, 10)
      assert {nil, ^results} = Results.end_reading(results, :reader)
      assert {nil, ^results} = Results.lose_reader(results, :reader)
    end
  end
end
