defmodule Chaos.Hangs do
  # Sidecars that live and do nothing: each must be seen within its limit, and its work be done by the next one.

  alias Chaos.Strikes

  @interval 500
  @heartbeat 4_000
  @floor 4_000
  @stall 8_000
  @start 60_000
  # Our own ticks and signals, on a machine that others use too.
  @slack 1_000

  def run(%{full?: full?, minutes: minutes}) do
    requests = if full?, do: 200, else: 60
    each = if full?, do: 100, else: 2
    sums = Chaos.undisturbed(requests, sidecars: 2)

    mark = Chaos.mark()

    instance =
      Chaos.start(
        sidecars: 3,
        heartbeat_interval: @interval,
        heartbeat_timeout: @heartbeat,
        stall_floor: @floor,
        stall_timeout: @stall,
        start_timeout: @start
      )

    plan = for n <- 1..each, fault <- [:stop, :spin, :endless_pass], do: {fault, moment(fault, n)}
    done = :counters.new(1, [])

    play = fn ->
      Strikes.play(instance, plan, done, at_once: 2, limit: 2 * @start, minutes: minutes)
    end

    {strikes, outcomes} = Chaos.load(instance, requests, 12, sums, done, play)
    Chaos.stop(instance)
    orphans = Chaos.orphans(mark)
    same = for {:same, attempts} <- outcomes, do: attempts

    [
      {"limits in ms",
       "heartbeat_interval #{@interval}, heartbeat_timeout #{@heartbeat}, stall_floor #{@floor}, stall_timeout #{@stall}, start_timeout #{@start}",
       nil}
      | seen(strikes)
    ] ++
      [
        {"distinct requests; asked for in all", "#{requests}; #{length(outcomes)}", nil},
        {"done with the bytes of an undisturbed run", "#{length(same)} of #{length(outcomes)}",
         length(same) == length(outcomes)},
        {"most attempts of one request", Enum.max(same), nil},
        {"processes left behind", length(orphans), orphans == []}
      ]
  end

  # A process that imports may hold its interpreter for long, so there is but `start_timeout` for that: a few of each.
  defp moment(:endless_pass, _n), do: :denoising
  defp moment(_fault, n) when rem(n, 25) == 0, do: :start
  defp moment(_fault, n), do: Enum.at(~w(any load denoising decoding encoding)a, rem(n, 5))

  defp seen(strikes) do
    for {{fault, moment}, strikes} <-
          Enum.group_by(strikes, &{&1.fault, moment(&1)}) |> Enum.sort() do
      limit = limit(fault, moment)
      ms = for %{ms: ms} when ms != nil <- strikes, do: ms
      in_time = Enum.count(ms, &(&1 <= limit))

      {"#{fault} #{moment}: seen within its limit of #{limit} ms; median and longest in ms",
       "#{in_time} of #{length(strikes)}; #{Chaos.median(ms)}, #{Enum.max(ms, fn -> nil end)}",
       in_time == length(strikes)}
    end
  end

  defp moment(%{moment: :start}), do: "while it starts"
  defp moment(_strike), do: "at work"

  defp limit(_fault, "while it starts"), do: @start + @slack
  defp limit(:endless_pass, _), do: @stall + @interval + @slack
  defp limit(_fault, _), do: @heartbeat + @slack
end
