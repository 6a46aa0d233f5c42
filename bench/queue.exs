# What the queue costs while 10,000 requests wait in it: microseconds an operation, and bytes a request.
#
#     mix run bench/queue.exs [REQUESTS]
#
# The decisions are timed by themselves, and the calls as a caller sees them, to and from the queue's process. Nothing
# runs: the sidecar of this instance is a program that sleeps.

alias StarweaveImage.Request
alias StarweaveImage.Queue.Schedule

requests = System.argv() |> List.first("10000") |> String.to_integer()

quantile = fn times, share ->
  sorted = Enum.sort(times)
  Enum.at(sorted, min(floor(length(sorted) * share), length(sorted) - 1)) / 1_000
end

row = fn name, times ->
  IO.puts(
    "| #{name} | #{Float.round(quantile.(times, 0.5), 1)} | #{Float.round(quantile.(times, 0.99), 1)} |"
  )
end

time = fn work ->
  began = System.monotonic_time(:nanosecond)
  result = work.()
  {System.monotonic_time(:nanosecond) - began, result}
end

# `work` from one state to the next, `count` times.
timed = fn state, count, work ->
  Enum.reduce(1..count, {[], state}, fn n, {times, state} ->
    {took, state} = time.(fn -> work.(n, state) end)
    {[took | times], state}
  end)
end

push = fn n, schedule ->
  Schedule.push(schedule, "r#{n}", :waiting,
    priority: Enum.at([:interactive, :normal, :background], rem(n, 3)),
    user: "user #{rem(n * 7, 1_000)}",
    model: "m",
    bytes: 100
  )
end

limits = [max_queue: 1_000_000, max_queue_bytes: 1_000_000_000]
full = Enum.reduce(1..requests, Schedule.new(limits), push)

full =
  Enum.reduce(1..4, full, &Schedule.sidecar(&2, &1, open?: true, capacity: 8, resident: ["m"]))

IO.puts("#{requests} requests of 1,000 users wait.\n")
IO.puts("| Decision | p50, µs | p99, µs |\n|---|---|---|")
{times, _} = timed.(full, 5_000, fn n, s -> push.(requests + n, s) end)
row.("take one in", times)

{times, _} =
  timed.(full, 5_000, fn _, s ->
    {:run, id, index, s} = Schedule.next(s)
    s |> Schedule.free(index, id) |> Schedule.drop(id)
  end)

row.("choose who goes next and where, and end it", times)
ids = for _ <- 1..5_000, do: "r#{:rand.uniform(requests)}"
{times, _} = timed.(full, 5_000, fn n, s -> Schedule.drop(s, Enum.at(ids, n - 1)) end)
row.("take one out", times)

{times, _} =
  timed.(full, 5_000, fn n, s ->
    Schedule.position(s, "r#{n}")
    s
  end)

row.("tell its place", times)

python = Path.join(System.tmp_dir!(), "starweave-bench-sleeps")
File.write!(python, "#!/bin/sh\nexec sleep 600\n")
File.chmod!(python, 0o755)

{:ok, instance} =
  StarweaveImage.start_link(
    name: Bench.Queue,
    python: python,
    max_queue: 1_000_000,
    start_timeout: 600_000,
    heartbeat_timeout: 600_000
  )

opts = fn n -> [instance: Bench.Queue, id: "r#{n}", user_id: "user #{rem(n * 7, 1_000)}"] end

memory = fn ->
  :erlang.garbage_collect(Process.whereis(Bench.Queue))
  Process.info(Process.whereis(Bench.Queue), :memory) |> elem(1)
end

before = memory.()
for n <- 1..requests, do: {:ok, _} = StarweaveImage.submit("a red apple", opts.(n))
held = memory.() - before
%{queue: %{queued: ^requests}} = StarweaveImage.status(instance: Bench.Queue)

IO.puts("\n| Call | p50, µs | p99, µs |\n|---|---|---|")
{times, _} = timed.(nil, 5_000, fn n, _ -> {:ok, _} = Request.new("a red apple", opts.(n)) end)
row.("check a request, in the caller", times)
requested = for n <- 1..5_000, do: Request.new("a red apple", opts.(requests + n)) |> elem(1)

{times, _} =
  timed.(requested, 5_000, fn _, [r | rest] ->
    {:ok, _} = GenServer.call(Bench.Queue, {:submit, r, nil, nil})
    rest
  end)

row.("submit", times)

{times, _} =
  timed.(nil, 5_000, fn n, _ -> :ok = StarweaveImage.subscribe("r#{n}", instance: Bench.Queue) end)

row.("subscribe, with its place", times)

flush = fn flush ->
  receive do
    _ -> flush.(flush)
  after
    0 -> :ok
  end
end

flush.(flush)

{times, _} =
  timed.(nil, 5_000, fn n, _ ->
    :ok = StarweaveImage.unsubscribe("r#{n}", instance: Bench.Queue)
  end)

row.("unsubscribe", times)

{times, _} =
  timed.(nil, 5_000, fn n, _ -> :ok = StarweaveImage.cancel("r#{n}", instance: Bench.Queue) end)

row.("cancel", times)

callers =
  for n <- 1..1_000,
      do:
        spawn(fn ->
          StarweaveImage.generate("a red apple", instance: Bench.Queue, id: "c#{n}")
        end)

queued = fn -> StarweaveImage.status(instance: Bench.Queue).queue.queued end
wait = fn wait, n -> if queued.() == n, do: :ok, else: wait.(wait, n) end
wait.(wait, requests + 1_000)

{times, _} =
  timed.({callers, queued.()}, 1_000, fn _, {[pid | rest], n} ->
    Process.exit(pid, :kill)
    wait.(wait, n - 1)
    {rest, n - 1}
  end)

row.("take out the request of a caller that dies, and ask until it is", times)
{times, _} = timed.(nil, 1_000, fn _, _ -> StarweaveImage.status(instance: Bench.Queue) end)
row.("status", times)

IO.puts("\n#{Float.round(held / requests / 1024, 2)} KiB a waiting request, its prompt included.")
Supervisor.stop(instance)
File.rm!(python)
