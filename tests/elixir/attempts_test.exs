defmodule StarweaveImage.AttemptsTest do
  use ExUnit.Case, async: true

  alias StarweaveImage.{Error, Request}
  alias StarweaveImage.Queue.{Attempts, Schedule, Verdict}

  @config [
    max_queue: 1_000,
    max_queue_bytes: 1_000_000,
    max_attempts: 3,
    max_retries: 2,
    quarantine: 60_000
  ]

  defp new(sidecars \\ 1, capacity \\ 4) do
    Enum.reduce(1..sidecars, Attempts.new(@config), &ready(&2, &1, capacity))
  end

  defp ready(attempts, index, capacity \\ 4) do
    news = [open?: true, capacity: capacity, device: "cpu", resident: ["m"]]
    %{attempts | schedule: Schedule.sidecar(attempts.schedule, index, news)}
  end

  defp request(id, prompt \\ "a fig") do
    {:ok, request} = Request.new(prompt, id: id, seed: 1)
    request
  end

  defp requests(ids), do: Map.new(ids, &{&1, request(&1)})

  defp open(attempts, ids),
    do: Enum.reduce(ids, attempts, &Attempts.open(&2, &1, :waiting, model: "m"))

  # All that can begin now, with pauses that are over at once. Gives who runs where.
  defp begin(attempts, ran \\ []) do
    case Attempts.next(attempts, fn _id -> 1_000_000 end) do
      {:run, id, index, attempts} ->
        begin(attempts, [{id, index} | ran])

      {:rest, id, pause, attempts} ->
        assert pause >= 0
        begin(%{attempts | schedule: Schedule.rested(attempts.schedule, id)}, ran)

      :nothing ->
        {Enum.reverse(ran), attempts}
    end
  end

  defp place(attempts, id), do: Schedule.place(attempts.schedule, id)
  defp taken(attempts, index), do: Schedule.taken(attempts.schedule, index)

  # Its sidecar dies `ms` after it was sent.
  defp die(attempts, index, open, ms \\ 100) do
    ran =
      for id <- taken(attempts, index), place(attempts, id) == index, do: {id, {ms, {:work, ms}}}

    alone? = length(taken(attempts, index)) == 1
    death = %{ran: ran, alone?: alone?, held: [], at_work?: ran != []}
    Attempts.died(attempts, index, death, open, "it was killed", 0)
  end

  defp failed(attempts, id, error, facts \\ []) do
    facts = Enum.into(facts, %{retries: 0, left: 100_000, fallbacks: []})
    # Its slot is free as soon as its sidecar has answered.
    index = place(attempts, id)
    attempts = %{attempts | schedule: Schedule.free(attempts.schedule, index, id)}
    Attempts.failed(attempts, id, error, facts)
  end

  describe "the end of a sidecar" do
    test "by death sends all that ran there again, the oldest first, and counts" do
      ids = ~w(a b c)
      {_, attempts} = new() |> open(ids) |> begin()
      {outcomes, attempts} = die(attempts, 1, requests(ids))
      assert outcomes == for(id <- ids, do: {:again, id, :died})
      assert Enum.map(ids, &place(attempts, &1)) == [:waiting, :waiting, :waiting]
      assert Enum.map(ids, &Schedule.attempts(attempts.schedule, &1)) == [1, 1, 1]
      assert Enum.map(ids, &Verdict.deaths(attempts.verdict, &1)) == [1, 1, 1]
      assert {[], _} = begin(attempts)
    end

    test "in order counts for nothing" do
      {_, attempts} = new() |> open(["a"]) |> begin()
      assert {[{:again, "a", :stopped}], attempts} = Attempts.stopped(attempts, 1)
      assert place(attempts, "a") == :waiting
      assert Schedule.attempts(attempts.schedule, "a") == 0
      assert Verdict.deaths(attempts.verdict, "a") == 0
    end

    test "again and again at the same point gives the request up, and refuses its like" do
      poison = requests(["poison"])

      {outcome, attempts} =
        Enum.reduce_while(1..60, open(new(), ["poison"]), fn _, attempts ->
          {[{"poison", 1}], attempts} = begin(ready(attempts, 1))

          case die(attempts, 1, poison) do
            {[{:again, "poison", :died}], attempts} -> {:cont, attempts}
            {[outcome], attempts} -> {:halt, {outcome, attempts}}
          end
        end)

      assert {:end, "poison", %Error{kind: :sidecar_crashed}} = outcome
      # Nothing speaks against whoever asks under that id next.
      assert Verdict.company(attempts.verdict, "poison") == :any
      assert {:error, _} = Verdict.admit(attempts.verdict, request("new"), 0)
      assert :ok = Verdict.admit(attempts.verdict, request("other", "a pear"), 0)
    end

    test "that gives one up makes those of its content run alone, and no others" do
      open = Map.put(requests(~w(poison like)), "other", request("other", "a pear"))

      attempts =
        Enum.reduce_while(1..60, Attempts.open(new(), "poison", :waiting, model: "m"), fn _,
                                                                                          attempts ->
          {_, attempts} = begin(ready(attempts, 1))
          # They wait, and nobody runs beside a suspect.
          attempts =
            if place(attempts, "like") == nil,
              do:
                Enum.reduce(~w(like other), attempts, &Attempts.open(&2, &1, :aside, model: "m")),
              else: attempts

          case die(attempts, 1, open) do
            {[{:again, _, _}], attempts} -> {:cont, attempts}
            {[{:end, _, _}], attempts} -> {:halt, attempts}
          end
        end)

      assert Verdict.company(attempts.verdict, "like") == :alone
      assert attempts.schedule.entries["like"].company == :alone
      assert Verdict.company(attempts.verdict, "other") == :any
      assert attempts.schedule.entries["other"].company == :any
    end
  end

  describe "a failed attempt" do
    setup do
      {[{"a", 1}], attempts} = new() |> open(["a"]) |> begin()
      {:ok, attempts: attempts}
    end

    test "is made again after a pause where that may help", %{attempts: attempts} do
      error = Error.new(:unavailable, "gone")
      assert {{:retry, "a", pause}, attempts} = failed(attempts, "a", error)
      assert pause > 0
      assert place(attempts, "a") == :aside
      assert Schedule.attempts(attempts.schedule, "a") == 0
    end

    test "is made again by another model", %{attempts: attempts} do
      error = Error.new(:model_load_failed, "damaged")
      facts = [fallbacks: ["one", "two"]]

      assert {{:fallback, "a", "one", ["two"], ^error}, attempts} =
               failed(attempts, "a", error, facts)

      assert place(attempts, "a") == :waiting
      assert attempts.schedule.entries["a"].model == "one"
    end

    test "is the end of the request otherwise, which is still there to be dropped", %{
      attempts: attempts
    } do
      error = Error.new(:invalid_request, "no")
      assert {{:end, "a", ^error}, attempts} = failed(attempts, "a", error)
      assert place(attempts, "a") == 1
      assert place(Attempts.drop(attempts, "a"), "a") == nil
    end

    test "that was cancelled, and not by us, is the end of its sidecar", %{attempts: attempts} do
      error = Error.new(:cancelled, "shutting down")
      assert {{:retry, "a", _}, _} = failed(attempts, "a", error)

      assert {{:end, "a", %Error{kind: :unavailable, message: message}}, _} =
               failed(attempts, "a", error, retries: 2)

      assert message =~ "the sidecar stopped"
    end

    test "that was cancelled to make room goes on without delay" do
      {[{"a", 1}], attempts} =
        new(1, 1) |> Attempts.open("a", :waiting, model: "m", priority: :background) |> begin()

      attempts = Attempts.open(attempts, "b", :waiting, model: "m", priority: :interactive)
      assert {:yield, "a", 1, attempts} = Attempts.next(attempts, fn _ -> 1_000 end)
      error = Error.new(:cancelled, "as asked")
      assert {{:again, "a", :yielded}, attempts} = failed(attempts, "a", error)
      assert {[{"b", 1}], _} = begin(attempts)
    end
  end

  describe "a trial" do
    defp on_trial do
      for _ <- 1..2, reduce: open(new(), ["a"]) do
        attempts ->
          {[{"a", 1}], attempts} = begin(ready(attempts, 1))
          {[{:again, "a", :died}], attempts} = die(attempts, 1, requests(["a"]))
          attempts
      end
    end

    test "has no pause where that does not fit the deadline" do
      attempts = on_trial()
      assert Verdict.company(attempts.verdict, "a") == :trial
      assert {:rest, "a", 0, _} = Attempts.next(ready(attempts, 1), fn "a" -> 10 end)
    end

    test "that ends otherwise than by a death is no bet" do
      for end_it <- [
            &Attempts.stopped(&1, 1),
            &failed(&1, "a", Error.new(:unavailable, "gone")),
            &failed(&1, "a", Error.new(:cancelled, "shutting down"))
          ] do
        {[{"a", 1}], attempts} = begin(ready(on_trial(), 1))
        assert attempts.verdict.cases["a"].stake != nil
        {_outcome, attempts} = end_it.(attempts)
        assert attempts.verdict.cases["a"].stake == nil
      end
    end
  end

  test "whatever happens, places and verdicts agree, and whoever must be alone is" do
    for _ <- 1..40 do
      {attempts, _open} =
        for n <- 1..60, reduce: {new(2), %{}} do
          {attempts, open} ->
            {attempts, open} = step(:rand.uniform(10), n, attempts, open)
            {_ran, attempts} = begin(attempts)
            check(attempts, open)
            {attempts, open}
        end

      # Nothing runs for ever at a sidecar that is gone.
      for index <- 1..2,
          {id, ^index} <- places(attempts),
          do: assert(id in taken(attempts, index))
    end
  end

  defp places(attempts), do: for({id, entry} <- attempts.schedule.entries, do: {id, entry.place})

  defp step(dice, n, attempts, open) when dice <= 4 do
    request = request("r#{n}", Enum.random(["a fig", "a pear"]))

    {Attempts.open(attempts, request.id, :waiting, model: "m"),
     Map.put(open, request.id, request)}
  end

  defp step(5, _n, attempts, open) do
    index = Enum.random(1..2)
    here = for id <- taken(attempts, index), place(attempts, id) == index, do: id
    {outcomes, attempts} = die(attempts, index, open, :rand.uniform(5_000))
    assert Enum.sort(Enum.map(outcomes, &elem(&1, 1))) == Enum.sort(here)
    assert taken(attempts, index) == []
    settle(ready(attempts, index), open, outcomes)
  end

  defp step(6, _n, attempts, open) do
    index = Enum.random(1..2)
    {outcomes, attempts} = Attempts.stopped(attempts, index)
    settle(ready(attempts, index), open, outcomes)
  end

  defp step(dice, _n, attempts, open) when dice <= 10 do
    case for {id, index} when is_integer(index) <- places(attempts), do: {id, index} do
      [] ->
        {attempts, open}

      running ->
        {id, index} = Enum.random(running)
        schedule = Schedule.free(attempts.schedule, index, id)

        case dice do
          7 ->
            kind = Enum.random([:cancelled, :internal, :out_of_memory, :unavailable])
            {outcome, attempts} = failed(attempts, id, Error.new(kind, "a failure"))
            settle(attempts, open, [outcome])

          8 ->
            # Cancelled by its owner: the slot is taken until the sidecar says so.
            {Attempts.drop(attempts, id), Map.delete(open, id)}

          _ ->
            attempts = %{attempts | schedule: schedule}
            attempts = Attempts.done(attempts, open[id], index, 1_000, 0, 0)
            {Attempts.drop(attempts, id), Map.delete(open, id)}
        end
    end
  end

  defp settle(attempts, open, outcomes) do
    Enum.reduce(outcomes, {attempts, open}, fn
      {:end, id, %Error{}}, {attempts, open} ->
        {Attempts.drop(attempts, id), Map.delete(open, id)}

      {:retry, id, _pause}, {attempts, open} ->
        assert place(attempts, id) == :aside
        {%{attempts | schedule: Schedule.resume(attempts.schedule, id)}, open}

      {_again, id, _reason}, {attempts, open} ->
        assert place(attempts, id) in [:waiting, :aside]
        {attempts, open}
    end)
  end

  defp check(attempts, open) do
    assert attempts.schedule.entries |> Map.keys() |> Enum.sort() ==
             open |> Map.keys() |> Enum.sort()

    assert Enum.all?(Map.keys(attempts.verdict.cases), &is_map_key(open, &1))

    for {id, entry} <- attempts.schedule.entries do
      company = Verdict.company(attempts.verdict, id)
      # One on trial runs alone when the pause before is over.
      assert entry.company == company or {entry.company, company} == {:alone, :trial}

      if is_integer(entry.place) and entry.company != :any,
        do: assert(taken(attempts, entry.place) == [id])
    end
  end
end
