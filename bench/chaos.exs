# Proves that no accepted work is lost, by real sidecars that die, hang and are killed together with their application:
#
#     bin/chaos [--full] [--minutes N] [SCENARIO…]
#
# Scenarios: killer kills supervisors hangs beams poison pair handover soak; by default all, each in a short form. A line for each figure;
# the exit status is 1 if one is not as it must be. Goals of time, which are the machine's too, are met or missed. docs/reliability.md has results.

for support <- ~w(telemetry os_process),
    do: Code.require_file("../tests/support/#{support}.ex", __DIR__)

for part <- ~w(harness killer kills supervisors hangs beams poison pair handover soak),
    do: Code.require_file("chaos/#{part}.exs", __DIR__)

Logger.configure(level: if(System.get_env("CHAOS_LOG"), do: :debug, else: :emergency))

scenarios = [
  killer: Chaos.Killer,
  kills: Chaos.Kills,
  supervisors: Chaos.Supervisors,
  hangs: Chaos.Hangs,
  beams: Chaos.Beams,
  poison: Chaos.Poison,
  pair: Chaos.Pair,
  handover: Chaos.Handover,
  soak: Chaos.Soak
]

{options, names} = OptionParser.parse!(System.argv(), strict: [full: :boolean, minutes: :integer])
full? = Keyword.get(options, :full, false)

chosen =
  case names do
    [] ->
      scenarios

    names ->
      for name <- names do
        Enum.find(scenarios, &(Atom.to_string(elem(&1, 0)) == name)) ||
          raise "no scenario is called #{name}: #{Enum.map_join(scenarios, " ", &elem(&1, 0))}"
      end
  end

{:ok, _} = Chaos.Watch.start_link()

broken =
  for {name, scenario} <- chosen do
    IO.puts("\n== #{name}#{if full?, do: ", full"}")
    began = System.monotonic_time(:second)
    figures = scenario.run(%{full?: full?, minutes: options[:minutes]})

    for {what, value, ok?} <- figures do
      verdict =
        %{
          nil => "",
          true => "ok",
          false => "BROKEN",
          {:goal, true} => "met",
          {:goal, false} => "missed"
        }[ok?]
        |> String.pad_trailing(6)

      IO.puts("#{verdict}  #{what}: #{value}")
    end

    IO.puts("took #{System.monotonic_time(:second) - began} s")
    if Enum.any?(figures, &match?({_, _, false}, &1)), do: name
  end
  |> Enum.reject(&is_nil/1)

unless System.get_env("CHAOS_KEEP"), do: File.rm_rf!(Chaos.folder())

if broken != [] do
  IO.puts("\nNot as it must be: #{Enum.join(broken, ", ")}")
  exit({:shutdown, 1})
end
