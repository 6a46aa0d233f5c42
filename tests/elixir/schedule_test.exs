defmodule StarweaveImage.ScheduleTest do
  # The decisions of the queue, which need neither processes nor clocks: examples, and what must hold whatever happens.
  use ExUnit.Case, async: true

  alias StarweaveImage.Queue.{RankedSet, RateLimit, Schedule}

  @limits [max_queue: 1_000, max_queue_bytes: 1_000_000]

  defp schedule(sidecars, limits \\ []) do
    for {index, news} <- sidecars, reduce: Schedule.new(Keyword.merge(@limits, limits)) do
      schedule -> Schedule.sidecar(schedule, index, [open?: true, capacity: 1] ++ news)
    end
  end

  defp push(schedule, id, options \\ []), do: Schedule.push(schedule, id, :waiting, options)

  # Everything that can go now goes.
  defp go(schedule, gone \\ []) do
    case Schedule.next(schedule) do
      {:run, id, index, schedule} -> go(schedule, [{id, index} | gone])
      :nothing -> {Enum.reverse(gone), schedule}
    end
  end

  # Serves one after the other, and says in which order.
  defp serve_all(schedule, served \\ []) do
    case Schedule.next(schedule) do
      {:run, id, index, schedule} ->
        schedule |> Schedule.free(index, id) |> Schedule.drop(id) |> serve_all([id | served])

      :nothing ->
        Enum.reverse(served)
    end
  end

  describe "order" do
    test "is priority, then users one by one, then age" do
      schedule = schedule(%{1 => []})

      requests = [
        {"a1", "ann", :normal},
        {"a2", "ann", :normal},
        {"a3", "ann", :normal},
        {"b1", "bob", :normal},
        {"z1", nil, :background},
        {"b2", "bob", :normal},
        {"n1", nil, :normal},
        {"i1", "ann", :interactive}
      ]

      schedule =
        for {id, user, priority} <- requests, reduce: schedule do
          schedule -> push(schedule, id, user: user, priority: priority)
        end

      order = ~w(i1 a1 b1 n1 a2 b2 a3 z1)
      assert Schedule.order(schedule) == order
      assert for(id <- order, do: Schedule.position(schedule, id)) == Enum.to_list(1..8)
      assert serve_all(schedule) == order
    end

    test "lets a user who comes late begin at once, and none catch up" do
      schedule =
        for n <- 1..10, reduce: schedule(%{1 => []}), do: (s -> push(s, "a#{n}", user: "ann"))

      {:run, "a1", 1, schedule} = Schedule.next(schedule)
      {:run, "a2", 1, schedule} = schedule |> Schedule.free(1, "a1") |> Schedule.next()
      schedule = for n <- 1..3, reduce: schedule, do: (s -> push(s, "b#{n}", user: "bob"))
      schedule = schedule |> Schedule.free(1, "a2") |> Schedule.drop("a2")
      assert ["b1", "a3", "b2", "a4", "b3", "a5" | _] = serve_all(schedule)
    end

    test "is age where the turn is the same, whatever the ids are" do
      schedule = for id <- ~w(z m a), reduce: schedule(%{}), do: (s -> push(s, id, user: id))
      assert Schedule.order(schedule) == ~w(z m a)
    end

    test "forgets turns that are over, and no others" do
      served = fn schedule, id, user ->
        {[{^id, 1}], schedule} = schedule |> push(id, user: user) |> go()
        over(schedule, 1, id)
      end

      all = for n <- 1..200, reduce: schedule(%{1 => []}), do: (s -> served.(s, "r#{n}", "u#{n}"))
      assert map_size(served.(all, "again", "u7").turns) == 1

      # Ann has two turns behind the one that is served: her third comes after another's second.
      schedule =
        for id <- ~w(a1 a2), reduce: schedule(%{1 => []}), do: (s -> push(s, id, user: "ann"))

      schedule = for id <- ~w(b1 b2), reduce: schedule, do: (s -> push(s, id, user: "bob"))

      schedule =
        for id <- ~w(a1 b1 a2), reduce: schedule do
          schedule ->
            {[{^id, 1}], schedule} = go(schedule)
            over(schedule, 1, id)
        end

      schedule = schedule |> push("a3", user: "ann") |> push("c1", user: "cho")
      assert Schedule.order(schedule) == ~w(b2 c1 a3)
    end

    test "has turns of its own in each priority" do
      schedule = schedule(%{1 => []})

      schedule =
        for id <- ~w(n1 n2),
            reduce: schedule,
            do: (s -> Schedule.push(s, id, :aside, user: "ann"))

      schedule =
        for n <- 1..4, reduce: schedule do
          schedule ->
            schedule = push(schedule, "b#{n}", user: "zed", priority: :background)
            schedule = push(schedule, "c#{n}", user: "zed", priority: :background)
            {[{id, 1}], schedule} = go(schedule)
            over(schedule, 1, id)
        end

      schedule = schedule |> push("n3", user: "ann") |> push("m1", user: "bob")
      schedule = schedule |> Schedule.resume("n1") |> Schedule.resume("n2")
      assert ["n1", "m1", "n2", "n3" | _] = Schedule.order(schedule)
    end

    test "is kept by what comes back" do
      schedule =
        for n <- 1..4, reduce: schedule(%{1 => [capacity: 2]}), do: (s -> push(s, "r#{n}"))

      {[{"r1", 1}, {"r2", 1}], schedule} = go(schedule)
      {["r1", "r2"], schedule} = Schedule.lost(schedule, 1)

      schedule =
        for id <- ["r2", "r1"],
            reduce: schedule,
            do: (s -> Schedule.return(s, id, :waiting, :died))

      assert Schedule.order(schedule) == ~w(r1 r2 r3 r4)
      assert Schedule.attempts(schedule, "r1") == 1
    end
  end

  describe "admission" do
    test "is bounded in number and in bytes, and what runs is not counted as waiting" do
      schedule = schedule(%{1 => []}, max_queue: 2, max_queue_bytes: 10)
      {[{"a", 1}], schedule} = schedule |> push("a", bytes: 4) |> go()
      assert Schedule.admit(schedule, 6) == :ok
      assert {:overloaded, ms} = Schedule.admit(schedule, 7)
      assert ms >= 100
      schedule = schedule |> push("b") |> Schedule.push("c", :aside, [])
      assert {:overloaded, _} = Schedule.admit(schedule, 0)
      assert schedule |> Schedule.drop("c") |> Schedule.admit(6) == :ok
      assert schedule |> Schedule.drop("b") |> Schedule.drop("a") |> Schedule.admit(10) == :ok
    end

    test "tells of the next twenty, and of when each will go" do
      schedule = for n <- 1..30, reduce: schedule(%{1 => []}), do: (s -> push(s, "r#{n}"))
      {[{"r1", 1}], schedule} = go(schedule)
      status = Schedule.status(schedule)
      assert %{queued: 29, running: 1, limit: 1_000, bytes: 0, max_bytes: 1_000_000} = status
      assert length(status.next) == 20
      # Nothing was measured yet: a second a run is assumed.
      assert hd(status.next) == %{id: "r2", position: 1, estimated_start_ms: 1_000}
      assert List.last(status.next) == %{id: "r21", position: 20, estimated_start_ms: 20_000}
      assert status.estimated_start_ms == 30_000
      assert Schedule.attempts(schedule, "r1") == 1
      assert Schedule.attempts(schedule, "nobody") == 0
      assert Schedule.place(schedule, "nobody") == nil
    end

    test "asks for a tenth of a second at least" do
      schedule = schedule(%{1 => []}, max_queue: 1) |> push("r1")
      quick = for _ <- 1..50, reduce: schedule, do: (s -> Schedule.measure(s, 1, 1, 0))
      assert Schedule.admit(quick, 0) == {:overloaded, 100}
    end

    test "measures a run without the load before it" do
      schedule = schedule(%{1 => []}) |> push("r1") |> go() |> elem(1)
      loaded = for _ <- 1..50, reduce: schedule, do: (s -> Schedule.measure(s, 1, 8_000, 6_000))
      assert_in_delta Schedule.wait_ms(loaded, 1), 2_000, 10
      # Two clocks may disagree.
      odd = for _ <- 1..50, reduce: schedule, do: (s -> Schedule.measure(s, 1, 100, 200))
      assert Schedule.wait_ms(odd, 1) == 0
    end

    test "says when there will be room by what was measured" do
      schedule = schedule(%{1 => [capacity: 2]}, max_queue: 4)
      schedule = for n <- 1..6, reduce: schedule, do: (s -> s |> push("r#{n}") |> go() |> elem(1))
      slow = for _ <- 1..50, reduce: schedule, do: (s -> Schedule.measure(s, 1, 10_000, 0))
      quick = for _ <- 1..50, reduce: schedule, do: (s -> Schedule.measure(s, 1, 100, 0))
      {:overloaded, after_slow} = Schedule.admit(slow, 0)
      {:overloaded, after_quick} = Schedule.admit(quick, 0)
      # Five turns at two slots.
      assert_in_delta after_slow, 25_000, 500
      assert_in_delta after_quick, 250, 25
      assert Schedule.wait_ms(slow, 1) < Schedule.wait_ms(slow, 4)
      assert Schedule.wait_ms(Schedule.sidecar(slow, 1, open?: false), 1) == nil
    end
  end

  describe "placement" do
    test "prefers the sidecar that has the model, unless it has much to do" do
      schedule = schedule(%{1 => [capacity: 8], 2 => [capacity: 8, resident: ["m"]]})

      {gone, _} =
        for(n <- 1..12, reduce: schedule, do: (s -> push(s, "r#{n}", model: "m"))) |> go()

      assert {"r1", 2} = hd(gone)
      # A load is expected to cost five seconds, a run one.
      assert Enum.count(gone, fn {_, index} -> index == 2 end) == 8
    end

    test "weighs the work that a sidecar has, and what is to be added to it" do
      schedule = schedule(for index <- 1..2, do: {index, [capacity: 4, resident: ["m"]]})

      # Number 2 has one request already, and is quicker.
      second = fn slower ->
        schedule = Schedule.measure(schedule, 1, slower, 0)
        schedule = for _ <- 1..60, reduce: schedule, do: (s -> Schedule.measure(s, 2, 1_000, 0))

        {[{"first", 2}, {"second", index}], _} =
          schedule |> push("first", model: "m") |> push("second", model: "m") |> go()

        index
      end

      assert second.(1_800) == 1
      assert second.(2_200) == 2
    end

    test "weighs a load by what was measured of loads" do
      # Number 1 has the model and a run of work, number 2 neither: which is quicker is a matter of the load.
      place = fn run_ms, load_ms ->
        schedule = schedule(%{1 => [capacity: 2, resident: ["m"]], 2 => [capacity: 2]})

        measured =
          for _ <- 1..60, index <- 1..2, reduce: schedule do
            schedule -> Schedule.measure(schedule, index, run_ms + load_ms, load_ms)
          end

        {[{"first", 1}, {"second", index}], _} =
          measured |> push("first", model: "m") |> push("second", model: "m") |> go()

        index
      end

      assert place.(100_000, 1_000) == 2
      assert place.(100_000, 60_000) == 1

      # No load is no measurement of one: the five seconds assumed at first are more than half of this run.
      assert place.(9_000, 0) == 1
      assert place.(11_000, 0) == 2
    end

    test "takes a sidecar that died for one that has nothing" do
      schedule = schedule(%{1 => [capacity: 2, resident: ["m"]], 2 => [capacity: 2]})
      {[], lost} = Schedule.lost(schedule, 1)
      {[], lost} = Schedule.lost(lost, 2)
      assert lost |> push("r", model: "m") |> Schedule.next() == :nothing
      # What it can take now it has yet to say.
      open = Schedule.sidecar(lost, 1, open?: true)
      assert open |> push("r", model: "m") |> Schedule.next() == :nothing
      assert open |> push("r", company: :alone) |> Schedule.next() == :nothing

      back =
        for index <- 1..2,
            reduce: lost,
            do: (s -> Schedule.sidecar(s, index, open?: true, capacity: 1))

      back = Schedule.sidecar(back, 2, resident: ["m"])
      assert {:run, "r", 2, _} = back |> push("r", model: "m") |> Schedule.next()
    end

    test "says who was at a sidecar that died, the oldest first" do
      schedule = schedule(%{1 => [capacity: 3]})
      schedule = for id <- ~w(z m a), reduce: schedule, do: (s -> push(s, id, user: id))
      {_, schedule} = go(schedule)
      assert {~w(z m a), _} = Schedule.lost(schedule, 1)
    end

    test "has forgiven a sidecar after five runs, however often it had died" do
      even = schedule(for index <- 1..2, do: {index, [capacity: 8, resident: ["m"]]})

      sick =
        for _ <- 1..10, reduce: even do
          schedule ->
            {[], schedule} = Schedule.lost(schedule, 1)
            Schedule.sidecar(schedule, 1, open?: true, capacity: 8, resident: ["m"])
        end

      healed = fn runs ->
        healed = for _ <- 1..runs, reduce: sick, do: (s -> Schedule.measure(s, 1, 1_000, 0))

        {gone, _} =
          for(n <- 1..8, reduce: healed, do: (s -> push(s, "r#{n}", model: "m"))) |> go()

        Enum.count(gone, fn {_, index} -> index == 1 end)
      end

      assert healed.(4) == 3
      assert healed.(5) == 4
    end

    test "spreads what makes no difference" do
      schedule = schedule(for index <- 1..3, do: {index, [capacity: 4, resident: ["m"]]})

      {gone, _} =
        for(n <- 1..6, reduce: schedule, do: (s -> push(s, "r#{n}", model: "m"))) |> go()

      assert gone |> Enum.frequencies_by(&elem(&1, 1)) == %{1 => 2, 2 => 2, 3 => 2}
    end

    test "gives a slow one less, and a sick one too until it has made up for it" do
      even = schedule(for index <- 1..2, do: {index, [capacity: 8, resident: ["m"]]})

      share = fn schedule ->
        {gone, _} =
          for(n <- 1..8, reduce: schedule, do: (s -> push(s, "r#{n}", model: "m"))) |> go()

        Enum.count(gone, fn {_, index} -> index == 1 end)
      end

      assert share.(even) == 4

      slow =
        for _ <- 1..50, reduce: even do
          schedule -> schedule |> Schedule.measure(1, 4_000, 0) |> Schedule.measure(2, 1_000, 0)
        end

      assert share.(slow) in 1..2
      {[], sick} = Schedule.lost(even, 1)
      sick = Schedule.sidecar(sick, 1, open?: true, capacity: 8, resident: ["m"])
      assert share.(sick) == 3
      assert sick |> Schedule.measure(1, 1_000, 0) |> share.() == 4
    end

    test "uses no sidecar that is closed, and none twice for the same id" do
      assert schedule(%{1 => [open?: false]}) |> push("r") |> Schedule.next() == :nothing
      {[{"r", 1}], schedule} = schedule(%{1 => [capacity: 2]}) |> push("r") |> go()
      # It was cancelled, and its slot is not free yet.
      schedule = schedule |> Schedule.drop("r") |> push("r")
      assert Schedule.next(schedule) == :nothing
      assert {:run, "r", 1, _} = schedule |> Schedule.free(1, "r") |> Schedule.next()
    end
  end

  describe "a request that must run alone" do
    defp alone(schedule, id, company \\ :alone, options \\ []),
      do: push(schedule, id, [company: company] ++ options)

    defp over(schedule, index, id), do: schedule |> Schedule.free(index, id) |> Schedule.drop(id)

    test "has its sidecar to itself, and others go on at another one" do
      schedule = schedule(%{1 => [capacity: 2], 2 => [capacity: 2]})
      {[{"a", 1}, {"b", 2}], schedule} = schedule |> push("a") |> push("b") |> go()
      # It has one of them reserved, which is not free yet.
      {[{"c", other}], schedule} = schedule |> alone("lone") |> push("c") |> push("d") |> go()
      home = 3 - other
      held = if home == 1, do: "a", else: "b"
      assert Schedule.order(schedule) == ["d"]
      assert Schedule.place(schedule, "lone") == :aside
      {[{"lone", ^home}], schedule} = schedule |> over(home, held) |> go()
      # Neither does anybody join it.
      {[], schedule} = go(schedule)
      assert {[{"d", ^home}], _} = schedule |> over(home, "lone") |> go()
    end

    test "and the others take turns at one sidecar, a full load of these at a time" do
      schedule = schedule(%{1 => [capacity: 3]})
      schedule = for n <- 1..4, reduce: schedule, do: (s -> alone(s, "lone#{n}"))
      schedule = for n <- 1..9, reduce: schedule, do: (s -> push(s, "r#{n}"))

      {turns, _} =
        for _ <- 1..7, reduce: {[], schedule} do
          {turns, schedule} ->
            {gone, schedule} = go(schedule)
            ids = for {id, 1} <- gone, do: id
            {[ids | turns], Enum.reduce(ids, schedule, &over(&2, 1, &1))}
        end

      assert Enum.reverse(turns) ==
               [~w(lone1), ~w(r1 r2 r3), ~w(lone2), ~w(r4 r5 r6), ~w(lone3), ~w(r7 r8 r9)] ++
                 [~w(lone4)]
    end

    test "goes behind others of its kind once it has had its turn" do
      schedule = schedule(%{1 => []}) |> alone("a") |> alone("b")
      {[{"a", 1}], schedule} = go(schedule)
      {["a"], schedule} = Schedule.lost(schedule, 1)

      schedule =
        schedule
        |> Schedule.return("a", :waiting, :died)
        |> Schedule.sidecar(1, open?: true, capacity: 1)

      assert Schedule.order(schedule) == ["b", "a"]
      assert {[{"b", 1}], _} = go(schedule)
    end

    test "goes first at a sidecar that died under a load of the others" do
      schedule = schedule(%{1 => [capacity: 2]}) |> alone("lone1") |> alone("lone2")
      schedule = for n <- 1..4, reduce: schedule, do: (s -> push(s, "r#{n}"))
      {[{"lone1", 1}], schedule} = go(schedule)
      {[{"r1", 1}, {"r2", 1}], schedule} = schedule |> over(1, "lone1") |> go()
      {ids, schedule} = Schedule.lost(schedule, 1)
      schedule = Enum.reduce(ids, schedule, &Schedule.return(&2, &1, :waiting, :died))

      assert {[{"lone2", 1}], _} =
               schedule |> Schedule.sidecar(1, open?: true, capacity: 2) |> go()
    end

    test "comes after those of a better priority, and before those of a worse one" do
      schedule = schedule(%{1 => []})

      schedule =
        schedule
        |> push("b", priority: :background)
        |> alone("n")
        |> push("i", priority: :interactive)

      assert serve_all(schedule) == ~w(i n b)
    end

    test "on trial lets its sidecar rest first, and all those that share its device" do
      device = fn device -> [capacity: 2, device: device] end
      schedule = schedule(%{1 => device.("cpu"), 2 => device.("cpu"), 3 => device.("cuda:0")})
      schedule = schedule |> Schedule.measure(3, 60_000, 0) |> alone("tried", :trial)
      {:rest, "tried", home, schedule} = Schedule.next(schedule)
      assert home in 1..2
      assert Schedule.resting(schedule, home) == "tried"
      assert Schedule.resting(schedule, 3 - home) == nil
      {gone, schedule} = for(n <- 1..3, reduce: schedule, do: (s -> push(s, "r#{n}"))) |> go()
      assert gone == [{"r1", 3}, {"r2", 3}]
      # It is told when the rest is over.
      schedule = Schedule.rested(schedule, "tried")
      {[{"tried", ^home}], schedule} = go(schedule)
      assert {[{"r3", _}], _} = schedule |> over(home, "tried") |> go()
    end

    test "waits for another one when its sidecar closes or dies before it begins" do
      for ending <- [
            &Schedule.sidecar(&1, 1, open?: false),
            &elem(Schedule.lost(&1, 1), 1),
            &Schedule.remove_sidecar(&1, 1)
          ] do
        {:rest, "tried", 1, schedule} =
          schedule(%{1 => []}) |> alone("tried", :trial) |> Schedule.next()

        schedule = ending.(schedule)
        assert Schedule.resting(schedule, 1) == nil
        assert Schedule.order(schedule) == ["tried"]
        # The end of a rest that was broken off means nothing.
        schedule = Schedule.rested(schedule, "tried")
        schedule = Schedule.sidecar(schedule, 2, open?: true, capacity: 1)
        assert {:rest, "tried", 2, schedule} = Schedule.next(schedule)
        schedule = Schedule.drop(schedule, "tried")
        assert schedule.reserved == %{}
        assert {[{"r", 2}], _} = schedule |> push("r") |> go()
      end
    end
  end

  describe "a background request" do
    test "steps back for an interactive one without room, the youngest first, and keeps its place" do
      {[_, _], schedule} =
        schedule(%{1 => [capacity: 2]})
        |> push("b1", priority: :background)
        |> push("b2", priority: :background)
        |> go()

      schedule =
        schedule
        |> push("b3", priority: :background)
        |> push("n1")
        |> push("i1", priority: :interactive)

      assert {:yield, "b2", 1, schedule} = Schedule.next(schedule)
      assert Schedule.yielding?(schedule, "b2")
      # One is enough for one.
      assert Schedule.next(schedule) == :nothing
      schedule = schedule |> Schedule.free(1, "b2") |> Schedule.return("b2", :waiting, :yielded)
      assert Schedule.attempts(schedule, "b2") == 0
      assert {:run, "i1", 1, schedule} = Schedule.next(schedule)
      assert Schedule.order(schedule) == ~w(n1 b2 b3)
    end

    test "that ends while it steps back leaves that to another" do
      {[_, _], schedule} =
        schedule(%{1 => [capacity: 2]})
        |> push("b1", priority: :background)
        |> push("b2", priority: :background)
        |> go()

      schedule = push(schedule, "i", priority: :interactive)
      assert {:yield, "b2", 1, schedule} = Schedule.next(schedule)
      assert Schedule.next(schedule) == :nothing
      # Its slot is not free yet.
      assert {:yield, "b1", 1, _} = schedule |> Schedule.drop("b2") |> Schedule.next()
    end

    test "does not for one of normal priority, and not for ever" do
      {[_], schedule} = schedule(%{1 => []}) |> push("b", priority: :background) |> go()
      assert schedule |> push("n") |> Schedule.next() == :nothing

      schedule =
        for n <- 1..3, reduce: schedule do
          schedule ->
            {:yield, "b", 1, schedule} =
              schedule |> push("i#{n}", priority: :interactive) |> Schedule.next()

            schedule =
              schedule |> Schedule.free(1, "b") |> Schedule.return("b", :waiting, :yielded)

            {[{_, 1}], schedule} = go(schedule)
            schedule = schedule |> Schedule.free(1, "i#{n}") |> Schedule.drop("i#{n}")
            {[{"b", 1}], schedule} = go(schedule)
            schedule
        end

      assert schedule |> push("i4", priority: :interactive) |> Schedule.next() == :nothing
    end
  end

  describe "whatever happens" do
    # Some thousand random operations, each followed by what must hold; a failure is repeated by the seed.
    for run <- 1..20 do
      test "slots, bounds and order hold (#{run})" do
        schedule =
          schedule(%{1 => [capacity: 3], 2 => [capacity: 2]}, max_queue: 30, max_queue_bytes: 400)

        final =
          for n <- 1..600, reduce: schedule do
            schedule ->
              schedule = step(schedule, :rand.uniform(16), n)
              check(schedule)
              schedule
          end

        # In the end everything that waits goes, and nothing is left of it.
        final =
          for index <- 1..2,
              reduce: final,
              do: (s -> Schedule.sidecar(s, index, open?: true, capacity: 4))

        final =
          for {id, %{place: :aside, home: nil}} <- final.entries,
              reduce: final,
              do: (s -> Schedule.resume(s, id))

        final =
          for {id, %{resting?: true}} <- final.entries,
              reduce: final,
              do: (s -> Schedule.rested(s, id))

        emptied = empty(final)
        assert emptied.entries == %{}
        assert {emptied.held, emptied.bytes, emptied.yielding} == {0, 0, 0}
        assert RankedSet.size(emptied.waiting) == 0
      end
    end
  end

  defp step(schedule, operation, n) when operation <= 4 do
    bytes = :rand.uniform(20)
    id = "r#{n}"

    case Schedule.admit(schedule, bytes) do
      :ok ->
        Schedule.push(schedule, id, Enum.random([:waiting, :waiting, :aside]),
          priority: Enum.random([:interactive, :normal, :background]),
          user: Enum.random(["ann", "bob", nil]),
          model: Enum.random(["m", "n"]),
          bytes: bytes,
          company: Enum.random([:any, :any, :any, :alone, :trial])
        )

      {:overloaded, ms} ->
        assert ms >= 100
        assert schedule.held >= 30 or schedule.bytes + bytes > 400
        schedule
    end
  end

  defp step(schedule, operation, _) when operation <= 8 do
    case Schedule.next(schedule) do
      {:run, id, index, after_it} ->
        %{key: {class, _, _, _}, company: company} = schedule.entries[id]
        taken = schedule.slots[index].taken
        # Nobody of a better priority waits, and of its own kind nobody was to go first.
        if company == :any do
          classes = for other <- Schedule.order(schedule), do: schedule.entries[other]
          assert Enum.all?(classes, &(elem(&1.key, 0) >= class or &1.company != :any))
          assert %{id: ^id} = Enum.find(classes, &(&1.company == :any))
          assert schedule.reserved[index] == nil
          assert map_size(taken) < schedule.slots[index].capacity
        else
          assert taken == %{} and after_it.reserved[index] == id
        end

        after_it

      {:rest, id, index, after_it} ->
        assert schedule.slots[index].taken == %{} and after_it.reserved[index] == id
        assert Schedule.resting(after_it, index) == id
        after_it

      {:yield, id, index, after_it} ->
        assert %{key: {2, _, _, _}, place: ^index} = schedule.entries[id]
        after_it

      :nothing ->
        schedule
    end
  end

  defp step(schedule, 9, _), do: with_random(schedule, &Schedule.drop(schedule, &1.id))

  defp step(schedule, 10, _) do
    # A sidecar says of one of its slots that it is free: the request is done, failed, or was over before.
    case for {index, slots} <- schedule.slots, {id, _} <- slots.taken, do: {index, id} do
      [] ->
        schedule

      taken ->
        {index, id} = Enum.random(taken)
        freed = Schedule.free(schedule, index, id)

        cond do
          Schedule.place(schedule, id) != index ->
            freed

          Schedule.yielding?(freed, id) ->
            Schedule.return(freed, id, :waiting, :yielded)

          :rand.uniform(3) == 1 ->
            Schedule.return(freed, id, Enum.random([:waiting, :aside]), :failed)

          true ->
            freed |> Schedule.measure(index, :rand.uniform(500), 0) |> Schedule.drop(id)
        end
    end
  end

  # One that is aside because it has a sidecar reserved is none that its owner put there.
  defp step(schedule, 11, _) do
    with_random(schedule, :aside, fn
      %{home: nil, id: id} -> Schedule.resume(schedule, id)
      _reserving -> schedule
    end)
  end

  defp step(schedule, 12, _) do
    {ids, schedule} = Schedule.lost(schedule, :rand.uniform(2))

    for id <- ids, reduce: schedule do
      schedule ->
        if Schedule.attempts(schedule, id) < 3,
          do:
            schedule
            |> Schedule.company(id, Enum.random([:any, :alone, :trial]))
            |> Schedule.return(id, :waiting, :died),
          else: Schedule.drop(schedule, id)
    end
  end

  defp step(schedule, 13, _), do: with_random(schedule, &Schedule.rested(schedule, &1.id))

  defp step(schedule, 14, _),
    do: with_random(schedule, :waiting, &Schedule.company(schedule, &1.id, :alone))

  defp step(schedule, _, _) do
    news = [
      open?: :rand.uniform(4) > 1,
      capacity: :rand.uniform(4),
      resident: Enum.take_random(["m", "n"], 1)
    ]

    Schedule.sidecar(schedule, :rand.uniform(2), news)
  end

  defp with_random(schedule, place \\ nil, fun) do
    case for {_, entry} <- schedule.entries, place in [nil, entry.place], do: entry do
      [] -> schedule
      entries -> fun.(Enum.random(entries))
    end
  end

  defp check(schedule) do
    waiting = for {id, %{place: :waiting}} <- schedule.entries, do: id
    aside = for {id, %{place: :aside}} <- schedule.entries, do: id
    assert Enum.sort(Schedule.order(schedule)) == Enum.sort(waiting)
    assert schedule.held == length(waiting) + length(aside)
    assert schedule.bytes == Enum.sum(for {_, entry} <- schedule.entries, do: entry.bytes)
    assert schedule.yielding == Enum.count(schedule.entries, fn {_, entry} -> entry.yielding? end)

    for {id, %{place: index} = entry} <- schedule.entries, is_integer(index) do
      assert is_map_key(schedule.slots[index].taken, id)
      assert entry.attempts in 1..3
    end

    # What is reserved is so for one that waits to run alone, or does.
    for {index, id} <- schedule.reserved do
      assert %{home: home, company: company} = schedule.entries[id]
      assert home != nil and company != :any
      assert is_map_key(schedule.slots, index)
    end

    for {id, %{home: home}} <- schedule.entries,
        home != nil,
        do: assert(schedule.reserved[home] == id)

    for {_, %{taken: taken}} <- schedule.slots,
        Enum.any?(taken, fn {_, alone?} -> alone? end),
        do: assert(map_size(taken) == 1)
  end

  defp empty(schedule) do
    case Schedule.next(schedule) do
      {:run, id, index, schedule} ->
        schedule |> Schedule.free(index, id) |> Schedule.drop(id) |> empty()

      {:yield, id, index, schedule} ->
        schedule |> Schedule.free(index, id) |> Schedule.drop(id) |> empty()

      {:rest, id, _index, schedule} ->
        schedule |> Schedule.rested(id) |> empty()

      :nothing ->
        case for {index, slots} <- schedule.slots, {id, _} <- slots.taken, do: {index, id} do
          [] ->
            schedule

          taken ->
            for(
              {index, id} <- taken,
              reduce: schedule,
              do: (s -> s |> Schedule.free(index, id) |> Schedule.drop(id))
            )
            |> empty()
        end
    end
  end

  test "users who all have requests are served alike, whoever has more" do
    for _ <- 1..20 do
      counts = for user <- ~w(ann bob cho dan), do: {user, :rand.uniform(40)}
      requests = for {user, count} <- counts, n <- 1..count, do: {"#{user}#{n}", user}

      schedule =
        for {id, user} <- Enum.shuffle(requests),
            reduce: schedule(%{1 => []}),
            do: (s -> push(s, id, user: user))

      served = serve_all(schedule)
      assert length(served) == length(requests)
      owner = Map.new(requests)
      least = counts |> Enum.map(&elem(&1, 1)) |> Enum.min()
      # As long as all of them have something, each round serves each of them once.
      for round <- served |> Enum.take(least * 4) |> Enum.chunk_every(4),
          do: assert(round |> Enum.map(&owner[&1]) |> Enum.sort() == ~w(ann bob cho dan))
    end
  end

  test "a ranked set is a sorted list, and stays shallow" do
    for _ <- 1..20 do
      operations = for _ <- 1..400, do: {Enum.random([:put, :put, :delete]), :rand.uniform(200)}

      {set, list} =
        for {operation, n} <- operations, reduce: {RankedSet.new(), []} do
          {set, list} ->
            list = if operation == :put, do: Enum.uniq([n | list]), else: List.delete(list, n)
            {apply(RankedSet, operation, [set, n]), list}
        end

      list = Enum.sort(list)
      assert RankedSet.to_list(set) == list
      assert RankedSet.size(set) == length(list)
      assert RankedSet.first(set) == List.first(list)
      for n <- [0, 1, 7, 1_000], do: assert(RankedSet.take(set, n) == Enum.take(list, n))
      for n <- 0..201, do: assert(RankedSet.rank(set, n) == Enum.count(list, &(&1 <= n)))
    end

    # Each node's halves weigh at most three times as much as each other, whatever came and went.
    for _ <- 1..30, reduce: RankedSet.new() do
      set ->
        for _ <- 1..200, reduce: set do
          set ->
            n = :rand.uniform(300)

            set =
              if n in RankedSet.to_list(set),
                do: RankedSet.delete(set, n),
                else: RankedSet.put(set, n)

            assert balanced?(set)
            set
        end
    end

    rising = Enum.reduce(1..10_000, RankedSet.new(), &RankedSet.put(&2, &1))
    falling = Enum.reduce(1..9_000, rising, &RankedSet.delete(&2, &1))
    # A weight-balanced tree of n elements is at most log2(n + 1) / log2(4 / 3) deep.
    assert balanced?(rising) and balanced?(falling)
    assert depth(rising) <= :math.log2(10_001) / :math.log2(4 / 3)
    assert depth(falling) <= :math.log2(1_001) / :math.log2(4 / 3)
  end

  defp balanced?(nil), do: true

  defp balanced?({_, _, left, right}) do
    {a, b} = {RankedSet.size(left) + 1, RankedSet.size(right) + 1}
    max(a, b) <= 3 * min(a, b) and balanced?(left) and balanced?(right)
  end

  defp depth(nil), do: 0
  defp depth({_, _, left, right}), do: 1 + max(depth(left), depth(right))

  describe "rate limits" do
    test "let a burst go and then one after the other" do
      limits = RateLimit.new({4, 1_000}, nil)
      limits = for _ <- 1..4, reduce: limits, do: (l -> l |> RateLimit.take("ann", 0) |> elem(1))
      assert {:wait, 250} = RateLimit.take(limits, "bob", 0)
      assert {:wait, 50} = RateLimit.take(limits, nil, 200)
      assert {:ok, limits} = RateLimit.take(limits, nil, 250)
      assert {:wait, 250} = RateLimit.take(limits, nil, 250)
    end

    test "count for each user, and what is refused takes nothing" do
      limits = RateLimit.new({3, 3_000}, {1, 1_000})
      {:ok, limits} = RateLimit.take(limits, "ann", 0)
      assert {:wait, 1_000} = RateLimit.take(limits, "ann", 0)
      {:ok, limits} = RateLimit.take(limits, "bob", 0)
      # Without a user only the common limit counts.
      {:ok, limits} = RateLimit.take(limits, nil, 0)
      assert {:wait, 1_000} = RateLimit.take(limits, "cho", 0)
      assert {:ok, _} = RateLimit.take(limits, "ann", 1_000)
      assert {:ok, _} = RateLimit.take(RateLimit.new(nil, nil), "ann", 0)
    end

    test "never let more through than they say, however it is asked" do
      for _ <- 1..20 do
        {requests, period} = limit = {:rand.uniform(10), 50 + :rand.uniform(1_000)}

        {_, times, _} =
          for _ <- 1..500, reduce: {RateLimit.new(limit, nil), [], 0} do
            {limits, times, now} ->
              now = now + :rand.uniform(40)

              case RateLimit.take(limits, nil, now) do
                {:ok, limits} ->
                  {limits, [now | times], now}

                {:wait, ms} ->
                  {:ok, _} = RateLimit.take(limits, nil, now + ms)
                  {limits, times, now}
              end
          end

        # A burst, and what has filled up meanwhile.
        for from <- times,
            do: assert(Enum.count(times, &(&1 in from..(from + period))) <= 2 * requests)
      end
    end

    test "say the longest of the waits" do
      limits = RateLimit.new({1, 1_000}, {1, 5_000})
      {:ok, limits} = RateLimit.take(limits, "ann", 0)
      assert {:wait, 5_000} = RateLimit.take(limits, "ann", 0)
      assert {:wait, 1_000} = RateLimit.take(limits, "bob", 0)
    end

    test "forget who has not asked for long, when there are over a thousand and then twice as many as were left" do
      users = fn limits, numbers, now ->
        for n <- numbers,
            reduce: limits,
            do: (l -> l |> RateLimit.take("u#{n}", now) |> elem(1))
      end

      buckets = fn limits -> map_size(limits.buckets) end
      limits = RateLimit.new({1_000_000, 1_000}, {1, 10})

      # Those of the first moment are full again in the next; that of all together stays.
      thousand = limits |> users.(1..998, 0) |> users.([999], 1_000)
      assert buckets.(thousand) == 1_000
      assert thousand |> users.([1_000], 1_000) |> buckets.() == 3

      # None is full when there are a thousand; the next time is at twice as many.
      many = users.(limits, 1..1_000, 0)
      assert buckets.(many) == 1_001
      many = users.(many, 1_001..1_998, 0)
      assert buckets.(many) == 1_999
      many = users.(many, 1_999..2_001, 1_000)
      assert buckets.(many) == 2_002
      assert many |> users.([2_002], 1_000) |> buckets.() == 5
    end

    test "of all together are not forgotten with those of users" do
      limits = RateLimit.new({1_001, 1_000_000_000}, {1, 1})

      limits =
        for n <- 1..1_001, reduce: limits, do: (l -> l |> RateLimit.take("u#{n}", n) |> elem(1))

      assert {:wait, _} = RateLimit.take(limits, "another", 1_001)
    end
  end
end
