defmodule StarweaveImage.VerdictTest do
  # Who is to blame for the deaths of sidecars: what follows from the end of an attempt, by example, and over simulated causes
  # in simulated time, with the attempts that the queue makes.
  use ExUnit.Case, async: true

  alias StarweaveImage.{Error, Request}
  alias StarweaveImage.Queue.{Attempts, Schedule, Verdict}

  defmodule World do
    # Sidecars, what kills them, and requests, as events on a clock that jumps from one to the next.
    #
    # `requests`: id → `%{run: ms, comes: ms, dies: fun, memory: n}`; `run` is how long it takes alone, `dies` gives after how many ms it
    # ends its process. `kill`: gives in how many ms all sidecars are killed the next time. `sick`: gives after how many ms a run
    # ends its process whatever it is, or nil. `memory`: what fits at once at the peaks of all that runs on the device.
    defstruct attempts: nil,
              requests: %{},
              events: :gb_sets.new(),
              now: 0,
              serial: 0,
              start: 3_000,
              kill: nil,
              sick: nil,
              memory: nil,
              sidecars: %{},
              running: %{},
              ends: %{},
              deaths: 0

    @deadline 600_000

    def run(options) do
      {count, options} = Keyword.pop(options, :sidecars, 1)
      {capacity, options} = Keyword.pop(options, :capacity, 8)
      world = struct!(__MODULE__, options)

      world = %{
        world
        | attempts:
            Attempts.new(
              max_attempts: 3,
              max_retries: 3,
              quarantine: 600_000,
              max_queue: 1_000,
              max_queue_bytes: 1_000
            ),
          sidecars: Map.new(1..count, &{&1, %{generation: 0, capacity: capacity}})
      }

      world = Enum.reduce(1..count, world, &start(&2, &1))

      world =
        for {id, _} <- Enum.sort(world.requests), reduce: world do
          world -> at(world, Map.get(world.requests[id], :comes, 0), {:comes, id})
        end

      world = if world.kill, do: at(world, world.kill.(), :kill), else: world
      live(world)
    end

    defp live(%{requests: requests, ends: ends} = world)
         when map_size(requests) == map_size(ends),
         do: world

    defp live(world) do
      {{now, _, event}, events} = :gb_sets.take_smallest(world.events)
      %{world | now: now, events: events} |> event(event) |> dispatch() |> live()
    end

    defp at(world, time, event) do
      serial = world.serial + 1
      events = :gb_sets.add({time, serial, event}, world.events)
      %{world | serial: serial, events: events}
    end

    defp start(world, index) do
      world = update_in(world.sidecars[index].generation, &(&1 + 1))
      world = put_in(world.sidecars[index][:ready?], false)
      generation = world.sidecars[index].generation
      at(world, world.now + world.start, {:ready, index, generation})
    end

    defp event(world, {:comes, id}) do
      attempts = Attempts.open(world.attempts, id, :waiting, model: "m")
      at(%{world | attempts: attempts}, world.now + @deadline, {:deadline, id})
    end

    defp event(world, {:ready, index, generation}) do
      if world.sidecars[index].generation == generation do
        news = [open?: true, capacity: world.sidecars[index].capacity, device: "d"]
        world = put_in(world.sidecars[index].ready?, true)
        update_in(world.attempts.schedule, &Schedule.sidecar(&1, index, news))
      else
        world
      end
    end

    defp event(world, :kill) do
      world = at(world, world.now + world.kill.(), :kill)
      Enum.reduce(Map.keys(world.sidecars), world, &die(&2, &1))
    end

    defp event(world, {:die, id, serial}) do
      case world.running do
        %{^id => %{serial: ^serial, index: index}} -> die(world, index)
        _ -> world
      end
    end

    defp event(world, {:peak, id, serial}) do
      case world.running do
        %{^id => %{serial: ^serial, index: index}} ->
          needed = for {id, _} <- world.running, do: world.requests[id].memory
          if Enum.sum(needed) > world.memory, do: die(world, index), else: world

        _ ->
          world
      end
    end

    defp event(world, {:done, id, serial}) do
      case world.running do
        %{^id => %{serial: ^serial, index: index}} ->
          run_ms = world.now - world.running[id].sent
          attempts = Attempts.done(world.attempts, asked(id), index, run_ms, 0, world.now)
          world = %{world | running: Map.delete(world.running, id), attempts: attempts}
          world = update_in(world.attempts.schedule, &Schedule.free(&1, index, id))
          finish(world, id, :done)

        _ ->
          world
      end
    end

    defp event(world, {:rested, id, serial}) do
      if world.serial >= serial and world.ends[id] == nil and
           world.requests[id][:rests] == serial,
         do: update_in(world.attempts.schedule, &Schedule.rested(&1, id)),
         else: world
    end

    defp event(world, {:deadline, id}) do
      case world.running[id] do
        nil ->
          finish(world, id, :timeout)

        %{index: index} ->
          world = %{world | running: Map.delete(world.running, id)}
          world = finish(world, id, :timeout)
          update_in(world.attempts.schedule, &Schedule.free(&1, index, id))
      end
    end

    defp finish(world, id, how) do
      if world.ends[id],
        do: world,
        else: %{
          world
          | ends: Map.put(world.ends, id, how),
            attempts: Attempts.drop(world.attempts, id)
        }
    end

    defp die(world, index) do
      %{schedule: schedule} = world.attempts
      taken = Schedule.taken(schedule, index)
      ids = for id <- taken, Schedule.place(schedule, id) == index, do: id

      points =
        for id <- ids do
          ms = world.now - world.running[id].sent
          {id, {ms, {:work, ms}}}
        end

      death = %{
        ran: points,
        alone?: length(taken) == 1,
        held: List.wrap(Schedule.resting(schedule, index)),
        at_work?: taken != []
      }

      # Those that have come, and have not ended.
      open = for {id, _} <- schedule.entries, into: %{}, do: {id, asked(id)}

      {outcomes, attempts} =
        Attempts.died(world.attempts, index, death, open, "it died", world.now)

      running = Map.drop(world.running, ids)
      world = %{world | attempts: attempts, running: running, deaths: world.deaths + 1}

      world =
        for {:end, id, %Error{kind: :sidecar_crashed}} <- outcomes, reduce: world do
          world -> finish(world, id, :given_up)
        end

      start(world, index)
    end

    defp dispatch(world) do
      left = &(@deadline + Map.get(world.requests[&1], :comes, 0) - world.now)

      case Attempts.next(world.attempts, left) do
        {:run, id, index, attempts} ->
          begin(%{world | attempts: attempts}, id, index) |> dispatch()

        {:rest, id, pause, attempts} ->
          serial = world.serial + 1
          world = put_in(%{world | attempts: attempts}.requests[id][:rests], serial)
          world |> at(world.now + pause, {:rested, id, serial}) |> dispatch()

        :nothing ->
          world
      end
    end

    # In company each takes longer, as they share a device.
    defp begin(world, id, index) do
      request = world.requests[id]
      serial = world.serial + 1
      attempt = %{index: index, sent: world.now, serial: serial}
      world = %{world | serial: serial, running: Map.put(world.running, id, attempt)}
      beside = length(Schedule.taken(world.attempts.schedule, index)) - 1
      run = request.run + div(request.run * beside, 4)
      world = at(world, world.now + run, {:done, id, serial})

      world =
        if dies = request[:dies],
          do: at(world, world.now + dies.(), {:die, id, serial}),
          else: world

      world =
        if sick = world.sick && world.sick.(),
          do: at(world, world.now + sick, {:die, id, serial}),
          else: world

      if world.memory,
        do: at(world, world.now + div(run * 4, 5), {:peak, id, serial}),
        else: world
    end

    defp asked(id), do: %Request{id: id, prompt: id, seed: 1, content: id}
  end

  defp good(count, run),
    do: for(n <- 1..count, into: %{}, do: {"good #{n}", %{run: run, memory: 1}})

  defp poison(dies, count \\ 1),
    do: for(n <- 1..count, into: %{}, do: {"poison #{n}", %{run: 60_000, dies: dies}})

  defp between(first, last), do: first + :rand.uniform(last - first + 1) - 1

  # The first one within the period, and then every period.
  defp every(period) do
    began? = :atomics.new(1, [])

    fn ->
      if :atomics.exchange(began?, 1, 1) == 0, do: between(1, period), else: period
    end
  end

  defp worlds(count, options), do: for(_ <- 1..count, do: World.run(options.()))

  defp ends(worlds) do
    for(world <- worlds, {id, how} <- world.ends, do: {hd(String.split(id)), how})
    |> Enum.frequencies()
  end

  describe "whatever the cause of the deaths is:" do
    for sidecars <- [1, 3] do
      @sidecars sidecars

      test "a poison is given up after a few, and all others are drawn, by #{sidecars}" do
        for dies <- [{20, 220}, {4_900, 5_200}, {29_600, 30_400}], good <- [0, 20] do
          options = fn ->
            requests = poison(fn -> between(elem(dies, 0), elem(dies, 1)) end)
            requests = if good > 0, do: Map.merge(requests, good(good, 1_000)), else: requests
            [sidecars: @sidecars, requests: requests]
          end

          worlds = worlds(20, options)
          assert %{{"poison", :given_up} => 20} = ends = ends(worlds)
          assert Map.get(ends, {"good", :done}, 0) == 20 * good
          assert map_size(ends) <= 2
          assert Enum.all?(worlds, &(&1.deaths <= 10)), inspect(Enum.map(worlds, & &1.deaths))
        end
      end

      test "several poisons at once are all given up where others are drawn, by #{sidecars}" do
        for count <- [2, 5] do
          options = fn ->
            requests = Map.merge(good(20, 1_000), poison(fn -> between(20, 220) end, count))
            [sidecars: @sidecars, requests: requests]
          end

          worlds = worlds(10, options)

          assert ends(worlds) == %{
                   {"good", :done} => 200,
                   {"poison", :given_up} => 10 * count
                 }

          assert Enum.all?(worlds, &(&1.deaths <= 10 * count))
        end
      end

      test "who kills from outside, in periods or at random, convicts nobody, by #{sidecars}" do
        worlds =
          for period <- [2_000, 3_500, 5_000, 8_000, 12_000, 20_000, 60_000],
              start <- [500, 3_000],
              _ <- 1..6 do
            random = fn -> ceil(-period * :math.log(:rand.uniform())) end
            kill = Enum.random([every(period), every(period), random])
            # Also such as are never drawn in the time that they are left.
            requests = good(20, between(100, 12_000))
            World.run(sidecars: @sidecars, start: start, kill: kill, requests: requests)
          end

        # 1 in 500 may be, by the worst of killers.
        ends = ends(worlds)
        assert Map.get(ends, {"good", :given_up}, 0) <= div(length(worlds) * 20, 500)
        # What had no time to be drawn ends at its deadline.
        assert Enum.all?(ends, fn {{"good", how}, _} -> how in [:done, :timeout, :given_up] end)
      end

      test "what alone has time between two kills is drawn, by #{sidecars}" do
        for period <- [12_000, 20_000] do
          options = fn ->
            # In company none has; more come all the time.
            requests =
              for {id, request} <- good(30, between(2_000, 4_000)), into: %{} do
                {id, Map.put(request, :comes, between(0, 300_000))}
              end

            [sidecars: @sidecars, start: 3_000, kill: every(period), requests: requests]
          end

          assert ends(worlds(5, options)) == %{{"good", :done} => 150}
        end
      end

      test "a device on which all dies convicts nobody, by #{sidecars}" do
        for dies <- [fn -> 300 end, fn -> between(50, 900) end] do
          options = fn -> [sidecars: @sidecars, sick: dies, requests: good(10, 1_000)] end
          assert ends(worlds(10, options)) == %{{"good", :timeout} => 100}
        end
      end

      test "a device on which each run may die convicts hardly anybody, by #{sidecars}" do
        dies = fn -> Enum.random([nil, 300]) end
        options = fn -> [sidecars: @sidecars, sick: dies, requests: good(10, 1_000)] end
        ends = ends(worlds(50, options))
        # 1 in 100 may be.
        assert Map.get(ends, {"good", :given_up}, 0) <= 15
        assert ends[{"good", :done}] >= 485
      end

      test "memory that is short for the sum of companions convicts nobody, by #{sidecars}" do
        for memory <- [1, 2, 5] do
          options = fn -> [sidecars: @sidecars, memory: memory, requests: good(20, 2_000)] end
          worlds = worlds(10, options)
          assert ends(worlds) == %{{"good", :done} => 200}
          assert Enum.all?(worlds, &(&1.deaths < 40))
        end
      end

      test "a slow start convicts nobody and acquits no poison, by #{sidecars}" do
        options = fn ->
          requests = Map.merge(good(20, 1_000), poison(fn -> between(20, 220) end))
          [sidecars: @sidecars, start: 40_000, requests: requests]
        end

        assert ends(worlds(10, options)) == %{
                 {"good", :done} => 200,
                 {"poison", :given_up} => 10
               }

        options = fn ->
          kill = every(between(60_000, 90_000))
          [sidecars: @sidecars, start: 40_000, kill: kill, requests: good(20, 1_000)]
        end

        assert ends(worlds(10, options)) == %{{"good", :done} => 200}
      end

      test "a poison is given up though somebody kills from outside too, by #{sidecars}" do
        options = fn ->
          requests = Map.merge(good(20, 1_000), poison(fn -> between(20, 220) end))
          [sidecars: @sidecars, start: 3_000, kill: every(30_000), requests: requests]
        end

        assert ends(worlds(10, options)) == %{
                 {"good", :done} => 200,
                 {"poison", :given_up} => 10
               }
      end
    end
  end

  defp verdict(options \\ []) do
    Verdict.new(Keyword.merge([max_attempts: 3, max_retries: 3, quarantine: 600_000], options))
  end

  defp request(id, seed, prompt \\ "a fig") do
    {:ok, request} = Request.new(prompt, id: id, seed: seed)
    request
  end

  defp died(verdict, ids, ms \\ 100) do
    ran = for id <- ids, do: {id, {ms, {:work, ms}}}
    Verdict.died(verdict, %{ran: ran, alone?: length(ids) == 1, held: [], at_work?: true})
  end

  # Dies at the same point of each trial, until it is given up.
  defp convict(verdict, request, now \\ 0) do
    case Verdict.judge(verdict, request, "it died", now) do
      {:give_up, error, verdict} ->
        {error, Verdict.drop(verdict, request.id)}

      {:again, company} ->
        verdict =
          if company == :trial,
            do: elem(Verdict.stake(verdict, request.id, 600_000), 1),
            else: verdict

        verdict |> died([request.id]) |> convict(request, now)
    end
  end

  describe "a request whose sidecar died" do
    test "goes on in company once, then alone, then on trial" do
      verdict = verdict() |> died(~w(a b c))
      assert Verdict.company(verdict, "a") == :any
      verdict = died(verdict, ~w(a b))
      assert {:again, :alone} = Verdict.judge(verdict, request("a", 1), "it died", 0)
      assert Verdict.company(verdict, "c") == :any
      verdict = died(verdict, ["a"])
      assert {:again, :trial} = Verdict.judge(verdict, request("a", 1), "it died", 0)
      # And alone again where the sidecar dies before it begins.
      {pause, verdict} = Verdict.stake(verdict, "a", 600_000)
      assert pause in 0..10_099
      nobody = %{ran: [], alone?: false, held: ["a"], at_work?: false}
      assert verdict |> Verdict.died(nobody) |> Verdict.company("a") == :alone
      assert Verdict.deaths(verdict, "a") == 3
    end

    test "has no pause before it, and so no bet, where there is no time left" do
      verdict = verdict() |> died(["a"]) |> died(["a"])
      assert {0, verdict} = Verdict.stake(verdict, "a", 20_000)
      assert verdict.cases["a"].stake == nil
    end

    test "is not given up for deaths that no pause came before, or when its bet was called off" do
      asked = request("a", 1)

      for _ <- 1..50, reduce: verdict() do
        verdict ->
          verdict = died(verdict, ["a"])
          {_pause, verdict} = Verdict.stake(verdict, "a", 600_000)
          verdict = verdict |> Verdict.call_off("a") |> died(["a"])
          assert {:again, _} = Verdict.judge(verdict, asked, "it died", 0)
          verdict
      end
    end

    test "is bet on once for each pause, and tried without one where that was of no use" do
      again = fn verdict -> verdict |> died(["a"], 100) |> died(["a"], 100) end
      {_, verdict} = verdict() |> again.() |> Verdict.stake("a", 600_000)

      won = died(verdict, ["a"], 100)
      assert %{odds: odds, stake: nil, company: :trial} = won.cases["a"]
      assert odds > 10
      assert again.(won).cases["a"].odds == odds

      missed = died(verdict, ["a"], 60_000)
      assert %{odds: odds, stake: nil, company: :alone} = missed.cases["a"]
      assert odds < 1
      assert again.(missed).cases["a"].odds == odds

      broken_off = Verdict.died(verdict, %{ran: [], alone?: false, held: ["a"], at_work?: false})
      assert %{odds: odds, stake: nil, company: :alone} = broken_off.cases["a"]
      assert odds < 1
      assert again.(broken_off).cases["a"].odds == odds
    end

    test "wins its bet within a fiftieth of the span, a sixteenth and a sixth, around the time it took before" do
      odds = fn before, ms ->
        verdict = verdict() |> died(["a"], before) |> died(["a"], before)
        {_, verdict} = Verdict.stake(verdict, "a", 600_000)
        died(verdict, ["a"], ms).cases["a"].odds
      end

      {kept, sixth, sixteenth, fiftieth} = {0.1, 0.15 * 6, 0.3 * 16, 0.45 * 50}

      for {before, ms, won} <- [
            {1_000, 889, kept + sixth + sixteenth},
            {1_000, 890, kept + sixth + sixteenth + fiftieth},
            {1_000, 1_110, kept + sixth + sixteenth + fiftieth},
            {1_000, 1_111, kept + sixth + sixteenth},
            {1_000, 1_344, kept + sixth},
            {1_000, 1_917, kept},
            # Nothing is before the beginning.
            {0, 0, kept + sixth + sixteenth + fiftieth},
            {0, 200, kept + sixth + sixteenth + fiftieth},
            {0, 201, kept + sixth + sixteenth}
          ],
          do: assert_in_delta(odds.(before, ms), won, 1.0e-9, "#{before} ms, then #{ms} ms")
    end

    test "has a pause only where twice the span is left" do
      verdict = verdict() |> died(["a"], 100) |> died(["a"], 100)
      assert {0, %{cases: %{"a" => %{stake: nil}}}} = Verdict.stake(verdict, "a", 20_200)
      assert {_, %{cases: %{"a" => %{stake: {10_100, _}}}}} = Verdict.stake(verdict, "a", 20_201)
    end

    test "is given up though others died in its company, and not for what was drawn before its first death" do
      tried = fn verdict ->
        {_, verdict} = Verdict.stake(verdict, "a", 600_000)
        died(verdict, ["a"])
      end

      ask = request("a", 1)
      verdict = verdict() |> died(~w(a b)) |> died(["a"])
      verdict = Enum.reduce(1..4, verdict, fn _, verdict -> tried.(verdict) end)
      assert {:give_up, _, _} = Verdict.judge(verdict, ask, "it died", 0)

      verdict =
        for n <- 1..20, reduce: verdict(), do: (v -> Verdict.done(v, request("d#{n}", n), 0))

      verdict = verdict |> died(["b"]) |> died(["a"]) |> died(["a"])
      verdict = Enum.reduce(1..4, verdict, fn _, verdict -> tried.(verdict) end)
      assert {:again, _} = Verdict.judge(verdict, ask, "it died", 0)
    end

    test "counts a death under nobody's request once" do
      operation = %{ran: [], alone?: false, held: [], at_work?: true}

      assert verdict() |> Verdict.died(operation) |> Verdict.died(operation) |> Map.get(:fallen) ==
               2

      assert verdict() |> Verdict.died(%{operation | at_work?: false}) |> Map.get(:fallen) == 0
    end

    test "is given up after `max_attempts` of them alone, at least" do
      for attempts <- [1, 3, 8] do
        {error, _} = [max_attempts: attempts] |> verdict() |> convict_new()
        assert %Error{kind: :sidecar_crashed, retryable?: false} = error
        [_, alone] = Regex.run(~r/times, (\d+) of them while it ran alone/, error.message)
        assert String.to_integer(alone) == max(attempts, 4)
      end
    end

    test "gains nothing from trials, on average, whenever its sidecar is killed" do
      # So that odds of n are reached by chance once in n at most.
      for _ <- 1..200 do
        point = between(0, 30_000)
        verdict = verdict() |> died(["a"], point) |> died(["a"], point)
        {_, verdict} = Verdict.stake(verdict, "a", 600_000)
        %{stake: {span, _}} = verdict.cases["a"]
        kill = between(0, span + 40_000)

        factors =
          for pause <- Enum.take_every(0..(span - 1), 7) do
            ended =
              if kill >= pause do
                died(verdict, ["a"], kill - pause)
              else
                nobody = %{ran: [], alone?: false, held: ["a"], at_work?: false}
                Verdict.died(verdict, nobody)
              end

            ended.cases["a"].odds
          end

        assert Enum.sum(factors) / length(factors) < 1.05
      end
    end

    test "is not given up while the others' requests all die too, nor for deaths under no request" do
      ask = request("a", 1)
      verdict = verdict() |> died(["b"])

      verdict =
        for _ <- 1..4, reduce: died(verdict, ["a"]) do
          verdict ->
            {_, verdict} = verdict |> died(["a"]) |> Verdict.stake("a", 600_000)
            verdict = died(verdict, ["a"])
            assert {:again, _} = Verdict.judge(verdict, ask, "it died", 0)
            verdict
        end

      # Others are drawn in the same time.
      verdict =
        for n <- 1..20, reduce: verdict, do: (v -> Verdict.done(v, request("d#{n}", n), 0))

      assert {:give_up, _, _} = Verdict.judge(verdict, ask, "it died", 0)

      operation = %{ran: [], alone?: false, held: [], at_work?: true}
      verdict = for _ <- 1..200, reduce: verdict, do: (v -> Verdict.died(v, operation))
      assert {:again, _} = Verdict.judge(verdict, ask, "it died", 0)
    end
  end

  defp convict_new(verdict, asked \\ request("a", 1)),
    do: verdict |> died([asked.id]) |> convict(asked)

  describe "quarantine" do
    test "is for the content of one that was given up, under any id and seed, for a while" do
      {_, verdict} = verdict(quarantine: 5_000) |> convict_new()

      for asked <- [request("a", 1), request("b", 2)] do
        assert {:error, %Error{kind: :sidecar_crashed, details: %{retry_after_ms: 4_000}}} =
                 Verdict.admit(verdict, asked, 1_000)

        assert Verdict.admit(verdict, asked, 5_000) == :ok
      end

      assert Verdict.admit(verdict, request("c", 1, "a pear"), 0) == :ok
    end

    test "is for its seed alone where the content was drawn with another, before or after" do
      before = verdict() |> Verdict.done(request("b", 2), 0)
      {_, before} = convict_new(before)
      {_, later} = convict_new(verdict())
      later = Verdict.done(later, request("b", 2), 0)

      for verdict <- [before, later] do
        assert {:error, _} = Verdict.admit(verdict, request("c", 1), 0)
        assert Verdict.admit(verdict, request("d", 3), 0) == :ok
      end
    end

    test "remembers no more than a thousand" do
      verdict =
        for n <- 1..2_500, reduce: verdict() do
          verdict ->
            verdict = Verdict.done(verdict, request("d#{n}", 1, "fig #{n}"), n)
            {_, verdict} = convict_new(verdict, request("r#{n}", 1, "pear #{n}"))
            verdict
        end

      assert map_size(verdict.refused) <= 1_000
      assert map_size(verdict.well) <= 1_000
      assert verdict.cases == %{}
    end
  end

  describe "a request of the journal" do
    test "is alone from the second end of an application on, and given up after many" do
      verdict = verdict(max_attempts: 2)
      assert {:go_on, verdict} = Verdict.recovered(verdict, "a", 1)
      assert Verdict.company(verdict, "a") == :any
      assert {:go_on, verdict} = Verdict.recovered(verdict, "a", 19)
      assert Verdict.company(verdict, "a") == :alone
      assert {:give_up, %Error{kind: :sidecar_crashed}} = Verdict.recovered(verdict, "a", 20)
    end
  end

  describe "a failure" do
    test "that may pass is tried again, with pauses that grow, as often as is allowed and there is time" do
      error = Error.new(:unavailable, "it is away")
      facts = %{retries: 0, left: 600_000, fallbacks: ["other"]}
      assert {:retry, pause} = Verdict.failed(verdict(), error, facts)
      assert pause in 250..500
      assert {:retry, pause} = Verdict.failed(verdict(), error, %{facts | retries: 2})
      assert pause in 1_000..2_000
      assert :give_up = Verdict.failed(verdict(), error, %{facts | retries: 3})
      assert :give_up = Verdict.failed(verdict(), error, %{facts | left: 200})
      final = %{error | retryable?: false}
      assert :give_up = Verdict.failed(verdict(), final, facts)
    end

    test "of a model is another's turn, when it is not tried again" do
      facts = %{retries: 3, left: 600_000, fallbacks: ["other", "third"]}

      for kind <- ~w(model_load_failed model_not_found out_of_memory)a do
        error = Error.new(kind, "no")
        assert {:fallback, "other", ["third"]} = Verdict.failed(verdict(), error, facts)
        assert :give_up = Verdict.failed(verdict(), error, %{facts | fallbacks: []})
      end

      error = Error.new(:internal, "it has NaN", %{field: :model})
      assert {:fallback, "other", ["third"]} = Verdict.failed(verdict(), error, facts)

      for details <- [%{}, %{field: :prompt}] do
        error = Error.new(:internal, "no", details)
        assert :give_up = Verdict.failed(verdict(), error, facts)
      end
    end
  end
end
