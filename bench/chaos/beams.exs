defmodule Chaos.Beams do
end
