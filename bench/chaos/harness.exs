defmodule Chaos do
  # What the scenarios share: instances of the real sidecar, requests whose bytes are known, and figures.

  alias StarweaveImage.{Environment, TestOSProcess}

  @support Path.expand("../../tests/support", __DIR__)
  # Ignored by a process that has not arranged for them yet, but for SIGUSR1.
  @signals "spin_interpreter:USR1 never_end_a_pass:URG die_in_a_frame:WINCH die_of_poison"

  def folder do
    folder = Path.join(System.tmp_dir!(), "starweave-chaos-#{System.pid()}")
    File.mkdir_p!(folder)
    folder
  end

  @doc "A Python that misbehaves when it is told to (tests/support/python/sitecustomize.py)."
  def python do
    {:ok, python} = Environment.python()
    path = Path.join(folder(), "python")

    unless File.exists?(path) do
      File.write!(path, """
      #!/bin/sh
      export PYTHONPATH='#{Path.join(@support, "python")}'"${PYTHONPATH:+:$PYTHONPATH}" STARWEAVE_TEST_MISBEHAVIOUR='#{@signals}'
      exec '#{python}' "$@"
      """)

      File.chmod!(path, 0o755)
    end

    path
  end

  @doc "The name of a new instance. Every process that it starts has `STARWEAVE_CHAOS` in its environment."
  def start(opts) do
    name = Module.concat(Chaos, "I#{System.unique_integer([:positive])}")
    {:ok, supervisor} = StarweaveImage.start_link([name: name] ++ options(opts))
    Process.put(name, supervisor)
    :ok = StarweaveImage.await_ready(120_000, instance: name)
    name
  end

  @doc "The options of such an instance, without a name."
  def options(opts) do
    defaults = [python: python(), env: ["STARWEAVE_CHAOS"], max_queue: 1_000]
    # Deaths in quick succession are what is tried here, not the pauses between them.
    Keyword.merge(defaults ++ [backoff_min: 20, backoff_max: 200], opts)
  end

  def stop(name) do
    name |> Process.delete() |> Supervisor.stop(:normal, 60_000)
  end

  @doc "Marks what is started from now on; gives the mark."
  def mark do
    mark = "#{System.pid()}-#{System.unique_integer([:positive])}"
    System.put_env("STARWEAVE_CHAOS", mark)
    mark
  end

  @doc "The processes with this mark that are alive after at most 5 s, watchdogs included."
  def orphans(mark, but \\ []) do
    marked = fn -> marked(mark) -- but end
    TestOSProcess.await(fn -> marked.() == [] end, 5_000)
    marked.()
  end

  # No line of parents to follow: what was left behind belongs to init.
  defp marked(mark) do
    for name <- File.ls!("/proc"),
        {pid, ""} <- [Integer.parse(name)],
        {:ok, environment} <- [File.read("/proc/#{pid}/environ")],
        "STARWEAVE_CHAOS=#{mark}" in String.split(environment, "\0"),
        TestOSProcess.alive?(pid),
        do: pid
  end

  def signal(os_pid, signal),
    do: System.cmd("/bin/sh", ["-c", "kill -s #{signal} #{os_pid} 2>/dev/null"])

  @things ~w(apple pear fig lemon plum boat house tree cup star)
  @colours ~w(red green blue yellow white black orange purple brown pink)

  @doc "Request number n: no two are alike."
  def request(n) do
    prompt =
      "a #{Enum.at(@colours, rem(n, 10))} #{Enum.at(@things, rem(div(n, 10), 10))} number #{n}"

    format = if rem(n, 2) == 0, do: :png, else: :jpeg
    opts = [seed: n, steps: 2 + rem(n, 3), format: format, width: 64, height: 64]
    {prompt, [reproducible: true, timeout: 3_600_000] ++ opts}
  end

  def draw(instance, n) do
    {prompt, opts} = request(n)
    StarweaveImage.generate(prompt, [instance: instance] ++ opts)
  end

  @doc "The SHA-256 of requests 1 to n by a sidecar that nobody disturbs."
  def undisturbed(n, opts \\ []) do
    instance = start(opts)

    sums =
      1..n
      |> Task.async_stream(
        fn n ->
          {:ok, image} = draw(instance, n)
          {n, digest(image)}
        end,
        max_concurrency: 8,
        timeout: :infinity
      )
      |> Map.new(fn {:ok, sum} -> sum end)

    stop(instance)
    sums
  end

  def digest(image), do: Base.encode16(:crypto.hash(:sha256, image.data), case: :lower)

  @doc """
  Asks for requests 1 to n over and over from `clients` processes while `strikes` goes on, all of them once at least, and counts in
  `done`. Gives the result of `strikes`, and the outcomes: `:same` bytes as `sums`, `:other` or the error, with the attempts.
  """
  def load(instance, n, clients, sums, done, strikes) do
    strikes = Task.async(strikes)
    turns = :atomics.new(1, [])
    over? = fn turn -> turn > n and not Process.alive?(strikes.pid) end
    client = fn -> client(instance, n, sums, done, turns, over?, []) end
    clients = for _ <- 1..clients, do: Task.async(client)
    outcomes = clients |> Task.await_many(:infinity) |> Enum.concat()
    {Task.await(strikes, :infinity), outcomes}
  end

  defp client(instance, n, sums, done, turns, over?, outcomes) do
    turn = :atomics.add_get(turns, 1, 1)

    if over?.(turn) do
      outcomes
    else
      number = rem(turn - 1, n) + 1

      outcome =
        case draw(instance, number) do
          {:ok, image} ->
            {if(digest(image) == sums[number], do: :same, else: :other), image.attempts}

          {:error, error} ->
            {error.kind, 0}
        end

      :counters.add(done, 1, 1)
      # The machine is others' too.
      Process.sleep(:rand.uniform(400))
      client(instance, n, sums, done, turns, over?, [outcome | outcomes])
    end
  end

  def now, do: System.monotonic_time(:millisecond)

  def median([]), do: nil

  def median(values) do
    sorted = Enum.sort(values)
    n = length(sorted)
    div(Enum.at(sorted, div(n - 1, 2)) + Enum.at(sorted, div(n, 2)), 2)
  end

  @doc "How often each is among the values, as a sentence."
  def tally(values) do
    values
    |> Enum.frequencies()
    |> Enum.sort()
    |> Enum.map_join(", ", fn {value, n} -> "#{n} #{value}" end)
  end

  def mebibytes(bytes), do: Float.round(bytes / 1_048_576, 1)

  @doc "Resident bytes of a process; 0 when it is gone."
  def resident(os_pid) do
    with {:ok, text} <- File.read("/proc/#{os_pid}/statm"),
         do: (text |> String.split() |> Enum.at(1) |> String.to_integer()) * 4096,
         else: (_ -> 0)
  end
end

defmodule Chaos.Watch do
  # Every sidecar process that telemetry told of, and when it started, was ready and ended.
  use GenServer

  def start_link, do: GenServer.start_link(__MODULE__, nil, name: __MODULE__)

  @doc "Of an instance, in the order of their starts: `%{os_pid, index, started, ready, ended, reason, phase}`."
  def sidecars(instance) do
    for({_, s} <- :ets.tab2list(__MODULE__), s.instance == instance, do: s)
    |> Enum.sort_by(& &1.started)
  end

  @doc "Those that live, by what they are at."
  def alive(instance), do: for(s <- sidecars(instance), s.ended == nil, do: s)

  @doc "Sends all telemetry to the calling process from now on."
  def listen, do: GenServer.call(__MODULE__, :listen)

  @doc "Drops what a listener has not read."
  def flush do
    receive do
      {:telemetry, _, _, _} -> flush()
    after
      0 -> :ok
    end
  end

  def claimed?(os_pid), do: :ets.member(Chaos.Claims, os_pid)

  @doc "Whether the caller is the first to strike this process."
  def claim(os_pid), do: :ets.insert_new(Chaos.Claims, {os_pid})

  def sidecar(os_pid), do: :ets.lookup_element(__MODULE__, os_pid, 2)

  @impl true
  def init(nil) do
    :ets.new(__MODULE__, [:named_table, read_concurrency: true])
    :ets.new(Chaos.Claims, [:named_table, :public])
    :telemetry.listen()
    {:ok, []}
  end

  @impl true
  def handle_call(:listen, {pid, _}, listeners) do
    Process.monitor(pid)
    {:reply, :ok, [pid | listeners]}
  end

  @impl true
  def handle_info({:telemetry, event, _, about} = news, listeners) do
    with [_, _, :sidecar, what] <- event, do: hear(what, about, Chaos.now())
    for pid <- listeners, do: send(pid, news)
    {:noreply, listeners}
  end

  def handle_info({:DOWN, _, _, pid, _}, listeners), do: {:noreply, List.delete(listeners, pid)}

  defp hear(:start, about, now) do
    sidecar = Map.take(about, [:instance, :index, :generation, :os_pid])
    sidecar = Map.merge(sidecar, %{started: now, ready: nil, ended: nil, reason: nil})
    :ets.insert(__MODULE__, {about.os_pid, sidecar})
  end

  defp hear(:ready, about, now), do: note(about.os_pid, %{ready: now})
  defp hear(:stop, about, now), do: note(about.os_pid, %{ended: now, reason: about.reason})
  defp hear(:heartbeat, _about, _now), do: :ok

  defp note(os_pid, news) do
    case :ets.lookup(__MODULE__, os_pid) do
      [{_, sidecar}] -> :ets.insert(__MODULE__, {os_pid, Map.merge(sidecar, news)})
      [] -> :ok
    end
  end
end

defmodule Chaos.Strikes do
  # Faults at random moments of a sidecar's life, one after the other, each until the end of that sidecar is told.

  import StarweaveImage.TestOSProcess, only: [await: 2]

  alias Chaos.Watch

  @signals %{kill: "KILL", stop: "STOP", spin: "USR1", endless_pass: "URG", frame: "WINCH"}
  # Up to so many ms after the event that opens the moment.
  @spread %{
    start: 4_000,
    load: 150,
    denoising: 30,
    decoding: 10,
    encoding: 5,
    frame: 1,
    any: 2_000
  }

  @doc """
  Plays a plan of `{fault, moment}`; between two of them 0 to 20 requests are `done`, or else nothing but strikes would ever
  come to its end. Options: `:at_once`; `:minutes`, after which no further one is begun; `:limit` in ms: one that was not seen within
  it ends the sidecar itself, and its `ms` is nil.
  """
  def play(instance, plan, done, options) do
    limit = Keyword.get(options, :limit, 60_000)
    ends = Chaos.now() + 60_000 * (options[:minutes] || 1_440)

    one = fn {fault, moment} ->
      Watch.listen()
      enough = :counters.get(done, 1) + :rand.uniform(21) - 1
      await(fn -> :counters.get(done, 1) >= enough end, 30_000)
      strike(instance, fault, moment, limit)
    end

    plan
    |> Stream.take_while(fn _ -> Chaos.now() < ends end)
    |> Task.async_stream(one, max_concurrency: options[:at_once], timeout: :infinity)
    |> Enum.map(fn {:ok, strike} -> strike end)
  end

  defp strike(instance, fault, moment, limit) do
    Watch.flush()
    os_pid = target(instance, moment)
    Process.sleep(:rand.uniform(@spread[moment]) - 1)
    %{ready: ready, ended: ended} = Watch.sidecar(os_pid)

    cond do
      # It was quicker than we were, to an end of its own or to the moment after.
      ended != nil or (moment == :start and ready != nil) or not Watch.claim(os_pid) ->
        strike(instance, fault, moment, limit)

      true ->
        at = Chaos.now()
        Chaos.signal(os_pid, @signals[fault])
        seen? = await(fn -> Watch.sidecar(os_pid).ended != nil end, limit)
        unless seen?, do: Chaos.signal(os_pid, "KILL")
        await(fn -> Watch.sidecar(os_pid).ended != nil end, 10_000)
        %{ended: ended, reason: reason} = Watch.sidecar(os_pid)
        %{fault: fault, moment: moment, reason: reason, ms: if(seen?, do: ended - at)}
    end
  end

  # Waits for the moment; gives whom it has come for.
  defp target(instance, :start) do
    starting = fn ->
      for s <- Watch.alive(instance), s.ready == nil, not Watch.claimed?(s.os_pid), do: s.os_pid
    end

    # A start is there soon after an end.
    if starting.() == [], do: Chaos.signal(target(instance, :any), "KILL")
    await(fn -> starting.() != [] end, 30_000)
    Enum.random(starting.())
  end

  defp target(instance, moment) when moment in [:any, :frame] do
    await(fn -> ready(instance) != [] end, 120_000)
    Enum.random(ready(instance)).os_pid
  end

  defp target(instance, :load) do
    receive do
      {:telemetry, [_, _, :sidecar, :heartbeat], _,
       %{instance: ^instance, phase: :loading} = about} ->
        case for(s <- ready(instance), s.index == about.index, do: s.os_pid) do
          [os_pid] -> os_pid
          [] -> target(instance, :load)
        end
    after
      # Both have it loaded: whoever is next does not.
      3_000 ->
        Chaos.signal(target(instance, :any), "KILL")
        target(instance, :load)
    end
  end

  defp target(instance, phase) do
    receive do
      {:telemetry, [_, _, :request, :progress], _, %{instance: ^instance, phase: ^phase, id: id}} ->
        sidecars = StarweaveImage.status(instance: instance).sidecars

        Enum.find_value(sidecars, &(id in &1.running && &1.os_pid)) || target(instance, phase)
    end
  end

  defp ready(instance) do
    for s <- Watch.alive(instance), s.ready != nil, not Watch.claimed?(s.os_pid), do: s
  end
end
