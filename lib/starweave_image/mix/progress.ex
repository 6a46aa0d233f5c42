defmodule StarweaveImage.Mix.Progress do
  @moduledoc false

  # How far a request is, for whoever waits at a command line: one line that is drawn over on a terminal, a few plain
  # lines elsewhere.

  alias StarweaveImage.Output

  defstruct [:mode, :since, :text, :detail, :drawn, :preview, previewed?: false]

  @opaque t :: %__MODULE__{}

  @doc """
  A line that says nothing yet. `:quiet` says nothing ever, `:plain` is whether to say something where there is no terminal
  (true), and `:preview` names the file for previews.

      iex> StarweaveImage.Mix.Progress.new(quiet: true) |> StarweaveImage.Mix.Progress.clear()
      :ok
  """
  @spec new(quiet: boolean, plain: boolean, preview: Path.t() | nil) :: t
  def new(opts) do
    mode =
      cond do
        opts[:quiet] -> :silent
        IO.ANSI.enabled?() -> :terminal
        Keyword.get(opts, :plain, true) -> :plain
        true -> :silent
      end

    %__MODULE__{mode: mode, since: now(), preview: opts[:preview]}
  end

  @doc "Shows an event of a request, or a `{:phase, text}` of the command's own."
  @spec show(t, StarweaveImage.event() | {:phase, String.t()}) :: t
  def show(bar, {:phase, text}), do: change(bar, text, nil)

  def show(bar, {:queued, %{attempt: attempt}}) when attempt > 1,
    do: change(bar, "Python ended, starting it again", nil)

  def show(bar, {:queued, %{position: 1}}), do: bar

  def show(bar, {:queued, %{position: n}}),
    do: change(bar, "Waiting, number #{n} in the queue", nil)

  def show(bar, {:progress, %{phase: :loading}}), do: change(bar, "Loading the model", nil)

  def show(bar, {:progress, %{phase: :denoising} = progress}) do
    text =
      if progress.num_images > 1,
        do: "Denoising image #{progress.image + 1} of #{progress.num_images}",
        else: "Denoising"

    change(bar, text, progress)
  end

  def show(bar, {:progress, %{phase: phase}}),
    do: change(bar, phase |> Atom.to_string() |> String.capitalize(), nil)

  def show(bar, {:preview, preview}) do
    # One that cannot be written is no reason to stop: the image may yet be.
    case Output.write(bar.preview, preview.data) do
      :ok -> announce_preview(bar)
      {:error, _reason} -> bar
    end
  end

  def show(bar, _event), do: bar

  defp announce_preview(%{previewed?: false, mode: mode} = bar) when mode != :silent do
    clear(bar)
    Mix.shell().info("[image.gen] Preview in #{bar.preview}, until the end")
    # The bar of a terminal was cleared for that line, a plain line stands.
    redraw(%{bar | previewed?: true, drawn: if(mode == :plain, do: bar.drawn)})
  end

  defp announce_preview(bar), do: bar

  defp change(bar, text, detail) do
    bar = if bar.text == text, do: bar, else: %{bar | text: text, since: now()}
    redraw(%{bar | detail: detail})
  end

  @doc "Draws it again, as time goes by."
  @spec redraw(t) :: t
  def redraw(%{mode: :silent} = bar), do: bar

  def redraw(bar) do
    line = if bar.mode == :terminal, do: bar_line(bar), else: plain_line(bar)

    if line == bar.drawn do
      bar
    else
      if bar.mode == :terminal,
        do: IO.write(["\r\e[K", line]),
        else: Mix.shell().info("[image.gen] " <> line)

      %{bar | drawn: line}
    end
  end

  @doc "Takes the line of a terminal away."
  @spec clear(t) :: :ok
  def clear(%{mode: :terminal}), do: IO.write("\r\e[K")
  def clear(_bar), do: :ok

  defp bar_line(%{detail: nil} = bar) do
    seconds = div(now() - bar.since, 1_000)
    fit(if seconds > 0, do: "#{bar.text}... #{seconds} s", else: "#{bar.text}...")
  end

  defp bar_line(%{detail: %{step: step, steps: steps} = progress} = bar) do
    eta = if progress.eta_ms, do: " #{seconds(progress.eta_ms)} left", else: ""
    tail = " #{step}/#{steps}#{eta}"
    width = min(columns() - String.length(bar.text <> tail) - 4, 40)
    filled = if width > 4, do: div(width * step, max(steps, 1)), else: 0

    if width > 4,
      do:
        "#{bar.text} [#{String.duplicate("#", filled)}#{String.duplicate(".", width - filled)}]#{tail}",
      else: fit(bar.text <> tail)
  end

  # At most ten lines of steps for an image, however many steps it has.
  defp plain_line(%{detail: nil} = bar), do: bar.text <> "..."

  defp plain_line(%{detail: %{step: step, steps: steps}} = bar) do
    tenth = div(step * 10, max(steps, 1))
    shown = div(tenth * steps + 9, 10)
    "#{bar.text}, step #{shown}/#{steps}"
  end

  defp seconds(ms), do: "#{div(ms + 999, 1_000)} s"
  defp fit(line), do: String.slice(line, 0, max(columns() - 1, 10))

  defp columns do
    case :io.columns() do
      {:ok, columns} -> columns
      {:error, _} -> 80
    end
  end

  defp now, do: System.monotonic_time(:millisecond)
end
